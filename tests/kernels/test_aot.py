"""Machine code without a GPU: no spills, wide asynchronous copies, few instructions a byte (compiled ahead of time)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def facts(which, *archs):
    """Facts of compiled kernels, made in a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kvplan.kernels.aot", which, *map(str, archs)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def label(fact):
    return " ".join(str(fact[k]) for k in ("arch", "kv_dtype", "scale_granularity", "head_dim", "group_size", "config"))


def assert_clean(fact):
    assert fact["spill_instructions"] == 0, label(fact)
    # row by row, a row with its scale inline is copied through L1, which only copies of at most 8 bytes go through
    by_row = not fact["config"]["whole_runs"]
    width = ".64" if fact["scale_granularity"] == "token_head_inline" and by_row else ".128"
    assert any(copy.endswith(width) for copy in fact["async_copies"]), label(fact)
    assert fact["matrix_products"], label(fact)


@pytest.mark.parametrize("arch", [89, 90, 100])
def test_usual_kernels_are_free_of_spills_and_spend_at_most_100_warp_instructions_a_kb(arch):
    made = facts("usual", arch)
    assert len(made) == 12
    for fact in made:
        assert_clean(fact)
        if fact["kv_dtype"] == "int4":
            assert fact["warp_instructions_per_kb"] <= 140, label(fact)
        elif fact["kv_dtype"] != "bf16":
            assert fact["warp_instructions_per_kb"] <= 100, label(fact)


@pytest.mark.skipif(
    "KVPLAN_SLOW_TESTS" not in os.environ, reason="the whole grid takes minutes: set KVPLAN_SLOW_TESTS=1"
)
@pytest.mark.parametrize("arch", [89, 90, 100])
def test_every_shipped_configuration_is_free_of_spills(arch):
    for fact in facts("shipped", arch):
        assert_clean(fact)


@pytest.mark.parametrize("arch", [89, 90])
def test_latent_kernels_copy_each_row_once_asynchronously_and_hardly_spill(arch):
    made = facts("latent", arch)
    assert [fact["kv_dtype"] for fact in made] == ["bf16", "fp8_e4m3", "fp8_ds_mla"]
    for fact in made:
        name = f"{arch} {fact['kv_dtype']}"
        assert fact["spill_instructions"] <= (8 if fact["kv_dtype"] == "fp8_ds_mla" else 0), name
        latent_bytes = {"bf16": 1152, "fp8_e4m3": 576, "fp8_ds_mla": 640}[fact["kv_dtype"]]
        wide_copies = fact["opcodes"]["LDGSTS"] - 4 * (fact["kv_dtype"] == "fp8_ds_mla")
        config = fact["config"]
        assert wide_copies * config["num_warps"] * 32 * 16 == config["block_n"] * latent_bytes, name


def test_architectures_without_e4m3_conversion_compile_by_bit_arithmetic():
    (bf16, fp8, *_) = facts("usual", 80)
    assert bf16["spill_instructions"] == fp8["spill_instructions"] == 0
    assert "F2FP" in bf16["opcodes"]
    assert fp8["opcodes"].get("HMUL2", 0) > 0  # the multiplication by 2**8 that stands for the conversion
