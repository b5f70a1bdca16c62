"""What is timed, from what was asked: formats, shapes, memory, order. No torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from kvplan.errors import InputError, KvplanError, UnknownNameError, UnsupportedError
from kvplan.measure.family import Family, Shape, checked_shape, kernel_names, model_shapes, parse_kv_dtypes
from kvplan.measure.plan import Cell, MeasureRequest, plan_cells, request_from_dict

SHAPE = Shape(64, 8, 128)
LATENT = Shape(16, 1, 576, latent_dim=512)
GIB = 2**30


def request(**changes: object) -> MeasureRequest:
    fields = {"shapes": (SHAPE,), "kv_dtypes": ("bfloat16", "fp8"), "batch_sizes": (1, 8), "effort": "quick",
              "context_tokens": (4096, 16384, 65536), "device": "cuda", **changes}  # fmt: skip
    return MeasureRequest(**fields)  # type: ignore[arg-type]


def test_bytes_a_token_are_those_of_the_format_scales_included() -> None:
    """2 · 8 heads · 128 values of 2 or 1 bytes; a 4-byte scale for each K and V row: 2 · 8 · 132."""
    assert Family(SHAPE, "bfloat16").bytes_per_token == 4096
    assert Family(SHAPE, "fp8").bytes_per_token == 2048
    assert Family(SHAPE, "fp8_per_token_head").bytes_per_token == 2112
    assert Cell(Family(SHAPE, "fp8"), 8, 1024).layer_bytes == 8 * 1024 * 2048


def test_formats_by_the_names_people_use() -> None:
    assert parse_kv_dtypes(["bf16", "fp8", "fp8_pth", "FP8", "int8:head"]) == (
        "bfloat16", "fp8", "fp8_per_token_head", "int8:head")  # fmt: skip
    assert kernel_names("fp8") == ("fp8_e4m3", "tensor")
    assert kernel_names("int8_per_token_head") == ("int8", "token_head")
    assert kernel_names("fp8:head") == ("fp8_e4m3", "head")
    assert kernel_names("nvfp4") == ("nvfp4", "block")
    assert Family(SHAPE, "nvfp4").bytes_per_token == 2 * 8 * (64 + 8)  # 128 half bytes, 8 one-byte scales
    with pytest.raises(UnsupportedError, match="head_dim 80"):
        Family(Shape(8, 1, 80), "nvfp4").check()


def test_a_latent_row_is_read_once_whatever_the_heads() -> None:
    """512 + 64 numbers of 2 or 1 bytes; 656: 512 codes, 4 FP32 scales and 64 numbers of 2 bytes."""
    for heads in (1, 128):
        shape = Shape(heads, 1, 576, latent_dim=512)
        assert [Family(shape, name).bytes_per_token for name in ("bfloat16", "fp8", "fp8_ds_mla")] == [1152, 576, 656]
    assert Cell(Family(LATENT, "fp8"), 8, 1024).read_bytes == 8 * 1024 * 576
    assert LATENT.describe() == "16 query heads on a latent of 512 + 64"


def test_each_kind_of_attention_has_formats_of_its_own() -> None:
    assert parse_kv_dtypes(["bf16", "fp8", "fp8_ds_mla"], latent=True) == ("bfloat16", "fp8", "fp8_ds_mla")
    for name in ("fp8_per_token_head", "fp16"):
        with pytest.raises(UnsupportedError, match="kernel of latent attention does not read it") as caught:
            parse_kv_dtypes([name], latent=True)
        assert "fp8_ds_mla" in (caught.value.hint or "")
    with pytest.raises(UnsupportedError, match="'fp8_ds_mla': rows of latent attention"):
        parse_kv_dtypes(["fp8_ds_mla"])


@pytest.mark.parametrize(
    "name",
    ["turboquant_k8v4", "fp32", "int4_per_token_head", "int8:none", "fp8:head:fp16", "bf16:head", "int4:block32"],
)
def test_a_format_the_kernels_lack_is_refused_with_those_they_have(name: str) -> None:
    with pytest.raises(UnsupportedError, match="do not read it") as caught:
        parse_kv_dtypes([name])
    assert "fp8_per_token_head" in (caught.value.hint or "")


def test_a_mistyped_format_gets_the_closest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_kv_dtypes(["fp8_per_token_heads"])
    assert "fp8_per_token_head" in caught.value.closest


def test_shapes_of_a_model_are_those_of_one_rank() -> None:
    """Llama 70B: 64 query and 8 KV heads of 128; TP 8 leaves 8 and 1, TP 16 keeps one KV head a rank."""
    assert model_shapes("70b", 1) == (SHAPE,)
    assert model_shapes("70b", 8) == (Shape(8, 1, 128),)
    assert model_shapes("70b", 16) == (Shape(4, 1, 128),)


def test_ranks_share_the_heads_of_latent_attention_and_each_has_the_whole_latent() -> None:
    """DeepSeek V3 has 128 query heads, Kimi K2 64."""
    assert model_shapes("deepseek-v3", 8) == (LATENT,)
    assert model_shapes("deepseek-v3", 1) == (replace(LATENT, num_q_heads=128),)
    assert model_shapes("kimi-k2", 8) == (replace(LATENT, num_q_heads=8),)


def test_a_model_with_windows_has_a_shape_for_each_kind_of_layer() -> None:
    shapes = model_shapes("gpt-oss-120b", 8)
    assert {shape.window_tokens for shape in shapes} == {None, 128}
    assert {(shape.num_q_heads, shape.num_kv_heads, shape.head_dim) for shape in shapes} == {(8, 1, 64)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: model_shapes("deepseek-v4-pro", 8), "no attention layer that the bundled kernels read"),
        (lambda: model_shapes("deepseek-v3.2", 8), "has sparse latent attention"),
        (lambda: model_shapes("deepseek-v3", 3), "TP 3 does not divide 128"),
        (lambda: checked_shape(Shape(16, 1, 288, latent_dim=256)), r"a latent of 256 \+ 32"),
        (lambda: checked_shape(Shape(65, 1, 576, latent_dim=512)), "65 query heads do not split evenly"),
        (lambda: model_shapes("70b", 3), "TP 3 does not divide 64"),
        (lambda: checked_shape(Shape(64, 8, 72)), "head_dim 72"),
        (lambda: checked_shape(Shape(64, 2, 128)), "32 query heads a KV head"),
        (lambda: checked_shape(Shape(7, 2, 128)), "cannot share"),
        (lambda: checked_shape(Shape(0, 1, 128)), "cannot share"),
    ],
)
def test_a_shape_the_kernels_do_not_take_is_one_line(call: object, words: str) -> None:
    with pytest.raises(KvplanError, match=words) as caught:
        call()  # type: ignore[operator]
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_the_largest_batch_and_the_ends_of_its_contexts_come_first() -> None:
    cells, skipped = plan_cells(request(), free_bytes=100 * GIB, l2_bytes=60 * 2**20)
    assert skipped == []
    order = [(c.batch_size, c.context_tokens, c.family.kv_dtype) for c in cells]
    assert order[:4] == [(8, 65536, "bfloat16"), (8, 65536, "fp8"), (8, 4096, "bfloat16"), (8, 4096, "fp8")]
    assert len(set(order)) == 12


def test_small_caches_get_as_many_layers_as_outrun_the_l2() -> None:
    """batch 1 × 4,096 in fp8 is 8 MiB; four times 60 MiB of L2 are 30 layers; large ones need two."""
    cells, _ = plan_cells(request(), free_bytes=100 * GIB, l2_bytes=60 * 2**20)
    layers = {(c.batch_size, c.context_tokens, c.family.kv_dtype): c.layers for c in cells}
    assert layers[1, 4096, "fp8"] == 30
    assert layers[8, 65536, "bfloat16"] == 2
    few, _ = plan_cells(request(), free_bytes=100 * GIB, l2_bytes=60 * 2**20, max_layers=2)
    assert {cell.layers for cell in few} == {2}


def test_a_cell_beyond_memory_is_listed_with_what_it_needs_and_one_that_fits_alone_stays() -> None:
    """8 × 65,536 × 4,096 B = 2 GiB a layer in bf16: two layers do not fit 3 GiB, one does; 1 GiB holds neither."""
    cells, skipped = plan_cells(request(), free_bytes=3 * GIB, l2_bytes=60 * 2**20)
    assert skipped == []
    assert next(c for c in cells if c.layer_bytes == 2 * GIB).layers == 1
    cells, skipped = plan_cells(request(), free_bytes=1 * GIB, l2_bytes=60 * 2**20)
    assert [item.cell for item in skipped] == ["bfloat16 batch 8 × 65,536", "fp8 batch 8 × 65,536"]
    assert skipped[0].reason == "needs 2.40 GiB, 921.6 MiB are free"  # one layer and what filling it takes
    assert len(cells) == 10


def test_too_many_cells_are_refused() -> None:
    with pytest.raises(InputError, match="cells"):
        plan_cells(request(batch_sizes=tuple(range(1, 2000))), free_bytes=GIB, l2_bytes=None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": None}, {"seed": "x"}, {"seed": 2**63}, {"seed": -1}, {"effort": "slow"}, {"effort": []},
        {"compare": ["triton"]}, {"batch_sizes": []}, {"batch_sizes": ["4"]}, {"context_tokens": [0]}, {"shapes": []},
        {"step_weight_dtype": "fp4"}, {"shapes": [{"num_q_heads": 8, "num_kv_heads": 0, "head_dim": 64}]},
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_measured_is_no_request(wrong: dict[str, object]) -> None:
    whole = {"shapes": [{"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}], "kv_dtypes": ["fp8"],
             "batch_sizes": [1], "context_tokens": [64], "compare": [], "step_context_tokens": [],
             "effort": "quick", "device": "cpu"}  # fmt: skip
    assert request_from_dict(whole, "request.json").batch_sizes == (1,)
    with pytest.raises(InputError, match=r"request\.json: not the request of a run"):
        request_from_dict(whole | wrong, "request.json")


def test_a_request_survives_its_json() -> None:
    import json

    asked = request(compare=("torch",), model="70b", tp_size=8)
    assert request_from_dict(json.loads(json.dumps(asked.as_dict())), "x") == asked
    latent = request(shapes=(LATENT,))
    assert request_from_dict(json.loads(json.dumps(latent.as_dict())), "x") == latent
    assert (latent.latent_heads, asked.latent_heads) == (16, None)
    with pytest.raises(InputError, match="not the request of a run"):
        request_from_dict({"shapes": [{}]}, "x")


def test_planning_and_the_command_line_load_no_torch() -> None:
    code = (
        "import sys, kvplan.cli.app, kvplan.measure.run, kvplan.measure.family as f, kvplan.terminal.measure_view\n"
        "f.model_shapes('70b', 8); f.parse_kv_dtypes(['fp8'])\n"
        "print(*(n for n in ('torch', 'triton') if n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
