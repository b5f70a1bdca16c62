"""Other implementations beside ours: what they are handed, and what is said where they are not installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvplan.kernels.bench import peers
from kvplan.kernels.bench.decode_attention import DecodeCell

CELL = DecodeCell((70, 5), scale_granularity="tensor", num_kv_heads=2, group_size=2, head_dim=64, block_size_tokens=16)


def attend(q, k, v, table, lengths, scale):
    """Attention over `[pages, slots, heads, dim]` caches, one sequence at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b, n in enumerate(lengths.tolist()):
        keys, values = (x[table[b].long()].flatten(0, 1)[:n].double() * scale for x in (k, v))
        for h in range(q.shape[1]):
            head = h * k.shape[2] // q.shape[1]
            logits = keys[:, head] @ q[b, h].double() * q.shape[2] ** -0.5
            out[b, h] = logits.softmax(0) @ values[:, head]
    return out


@pytest.fixture
def flashinfer(monkeypatch):
    def xqa(q, k, v, table, lengths, out, workspace, semaphores, heads, page, *, q_scale, kv_scale):
        assert (heads, page, q_scale) == (k.shape[2], k.shape[1], 1.0)
        out[:, 0] = attend(q[:, 0], k, v, table, lengths[:, 0].view(torch.int32), kv_scale).to(out.dtype)

    fake = ModuleType("flashinfer")
    fake.__version__, fake.xqa = "0", xqa
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(peers, "missing", lambda name: None)


@pytest.fixture
def vllm(monkeypatch):
    def varlen(q, k, v, *, seqused_k, block_table, out, k_descale=None, **options):
        assert options["fa_version"] == 3
        assert options["causal"]
        scale = 1.0 if k_descale is None else float(k_descale[0, 0])
        out.copy_(attend(q, k, v, block_table, seqused_k, scale))

    interface = SimpleNamespace(
        FA3_AVAILABLE=True, get_scheduler_metadata=lambda *a, **k: None, flash_attn_varlen_func=varlen
    )
    package, inner = ModuleType("vllm"), ModuleType("vllm.vllm_flash_attn")
    inner.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", inner)
    monkeypatch.setattr(peers, "missing", lambda name: None)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("kv_dtype", "granularity"), [("bf16", "none"), ("fp8_e4m3", "tensor"), ("fp8_e4m3", "none")])
def test_xqa_is_handed_the_cache_that_ours_reads(flashinfer, monkeypatch, layout, kv_dtype, granularity):
    monkeypatch.setattr(peers, "GATE_LENGTHS", (33, 1, 64))
    cell = DecodeCell(**{**vars(CELL), "layout": layout, "kv_dtype": kv_dtype, "scale_granularity": granularity})
    record = peers.measure("flashinfer", cell, device="cpu", samples=1)
    assert record["error"] < 4e-3  # bf16 output
    assert record["read_bytes"] == 75 * 2 * 2 * 64 * (2 if kv_dtype == "bf16" else 1)


def test_flash_attention_3_takes_the_query_in_e4m3_beside_an_fp8_cache(vllm, monkeypatch):
    monkeypatch.setattr(peers, "GATE_LENGTHS", (33, 1, 64))
    exact = peers.measure("vllm", DecodeCell(**{**vars(CELL), "kv_dtype": "bf16", "scale_granularity": "none"}),
                          device="cpu", samples=1)  # fmt: skip
    rounded = peers.measure("vllm", CELL, device="cpu", samples=1)
    assert exact["error"] < 4e-3 < rounded["error"] < 0.2


@pytest.mark.parametrize("wrong", [float("nan"), 0.0])
def test_a_peer_that_computes_something_else_is_not_timed(flashinfer, monkeypatch, wrong):
    monkeypatch.setattr(peers, "GATE_LENGTHS", (33, 1, 64))
    monkeypatch.setattr(
        sys.modules["flashinfer"], "xqa", lambda q, k, v, table, lengths, out, *a, **k_: out.fill_(wrong)
    )
    with pytest.raises(RuntimeError, match="FlashInfer XQA: its output is off by"):
        peers.measure("flashinfer", CELL, device="cpu", samples=1)


def test_a_peer_that_is_not_installed_says_how_to_get_it():
    if peers.missing("flashinfer") is None:
        pytest.skip("flashinfer is installed here")
    with pytest.raises(ImportError, match="pip install flashinfer-python"):
        peers.measure("flashinfer", CELL, device="cpu")


def test_formats_and_blocks_that_a_peer_does_not_read_are_refused(flashinfer):
    for change in ({"kv_dtype": "int8", "scale_granularity": "token_head"}, {"block_size_tokens": 256}):
        with pytest.raises(ValueError, match="reads"):
            peers.measure("flashinfer", DecodeCell(**{**vars(CELL), **change}), device="cpu")
