"""The measured choice: at most four candidates, measured once, remembered by GPU and versions."""

import json

import pytest

from kvplan.kernels import configs
from kvplan.kernels.bench import choose as module
from kvplan.kernels.bench.decode_attention import DecodeCell
from kvplan.kernels.device import KernelFacts
from kvplan.kernels.formats import HEAD_DIMS


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A CPU that pretends to be sm_90; the second candidate is the fastest. Returns the configurations timed."""
    seen = []
    monkeypatch.setenv("KVPLAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "architecture", lambda device: 90)

    def time_cell(cell, **_):
        seen.append(cell.config)
        return {"time_s": 1.0 if cell.config == configs.decode_configs(90, 8, 128, 8)[1] else 2.0}

    return seen, time_cell


def test_the_fastest_is_taken_and_remembered(timed):
    seen, time_cell = timed
    best = configs.decode_configs(90, 8, 128, 8)[1]
    assert module.choose(DecodeCell((64,) * 2), device="cpu", time_cell=time_cell) == best
    assert len(seen) == 3
    assert module.choose(DecodeCell((99,) * 4), device="cpu", time_cell=time_cell) == best
    assert len(seen) == 3


def test_a_sequence_alone_has_a_choice_of_its_own(timed):
    seen, time_cell = timed
    for lengths in ((64,) * 2, (64,)):
        module.choose(DecodeCell(lengths), device="cpu", time_cell=time_cell)
    assert [c.whole_runs for c in seen] == [True] + [False] * 6


def test_other_versions_measure_anew_and_a_spoilt_file_counts_as_empty(timed, monkeypatch):
    seen, time_cell = timed
    module.choose(DecodeCell((64,)), device="cpu", time_cell=time_cell)
    monkeypatch.setattr(module.triton, "__version__", "99.0")
    module.choose(DecodeCell((64,)), device="cpu", time_cell=time_cell)
    assert len(seen) == 8
    assert len(json.loads(module.cache_file().read_text())) == 2
    module.cache_file().write_text("{")
    module.choose(DecodeCell((64,)), device="cpu", time_cell=time_cell)
    assert len(seen) == 12


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group_size", [1, 8, 16])
@pytest.mark.parametrize("element_bits", [8, 16])
def test_no_shape_has_more_than_four_candidates(element_bits, head_dim, group_size):
    candidates = configs.decode_configs(90, element_bits, head_dim, group_size)
    assert 1 <= len(candidates) <= 4
    assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize(
    ("num_warps", "registers", "programs"),
    [
        (2, 168, 6),  # a warp of 5,376 registers: 3 in each quarter of 16,384, 12 in all
        (2, 200, 4),  # 6,400: 2 in each quarter, 8 in all, although ten would fit 65,536
        (4, 255, 2),
        (1, 128, 16),
    ],
)
def test_programs_a_multiprocessor_holds_go_by_the_registers_of_its_quarters(num_warps, registers, programs):
    assert KernelFacts("attend", num_warps, registers, 0, shared_bytes=4096).ctas_per_sm(90) == programs
