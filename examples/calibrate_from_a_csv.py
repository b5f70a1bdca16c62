"""Calibrate attention from eighteen measured latencies, keep the file, and predict a size that nobody measured."""

import signal
from pathlib import Path

from kvplan.calibration.calibrate import calibrate_file, predict_file
from kvplan.calibration.document import write_json
from kvplan.gpu import resolve_gpu

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly under `| head`
SAMPLES = Path(__file__).parent / "h200_decode_attention.csv"  # from `kvplan measure` on an H200
HEADER = "batch_size,context_tokens,num_q_heads,num_kv_heads,head_dim,window_tokens,kv_dtype"

document, points = calibrate_file(SAMPLES, resolve_gpu("h200"), name="my-h200", engine="kvplan")
output = Path("my-h200.json")
write_json(output, document, force=True)  # in ~/.config/kvplan/calibrations it is used by name of the GPU
print(f"{len(points.rows)} samples, {len(points.refused)} refused; wrote {output}")
for name, fit in document["kv_dtypes"].items():
    rate = fit["effective_bandwidth_bytes_per_s"] / 1e12
    print(f"  {name}: {fit['intercept_s'] * 1e6:.1f} µs + bytes at {rate:.2f} TB/s")

cases = Path("cases.csv")
cases.write_text(f"{HEADER}\n16,131072,64,8,128,0,bfloat16\n16,131072,64,8,128,0,fp8\n")
found = predict_file(cases, document)
for name, middle, low, high in zip(("bf16", "fp8"), found.middle_s, found.low_s, found.high_s, strict=True):
    print(f"batch 16 at 131,072 tokens, {name}: {middle * 1e6:.0f} µs, 80% interval {low * 1e6:.0f}–{high * 1e6:.0f}")
