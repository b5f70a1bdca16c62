"""What the kernels are held to, measured: `python -m kvplan.kernels.bench.bars -o RECORDS.jsonl [--device cpu]`.

Every family is gated against the float64 reference first. Slopes are least-squares lines of time against bytes over
five contexts; the roofline is the read kernel's, in the same run. Each record is appended as it is taken. On a CPU
(tiny sizes) the same steps run, but the figures mean nothing there and the output says so.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from ..mla_decode import FORMAT_CODES
from . import decode_attention as decode
from . import mla_decode as latent
from . import peers
from . import read_roofline as roofline
from .choose import choose, is_default
from .decode_attention import DecodeCell

CONTEXTS = (8192, 16384, 32768, 49152, 65536)
HELD_FROM_1_GB = ("bf16 HND", "fp8 tensor HND", "fp8 head HND", "bf16 HND batch 32", "fp8 tensor HND batch 32")
MIXED = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024) * 2


@dataclass(frozen=True)
class Line:
    """time = intercept + bytes / bytes_per_s; `slope_s_per_token` of one sequence's context, for the whole batch."""

    bytes_per_s: float
    intercept_s: float
    slope_s_per_token: float


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares (slope, intercept) of (x, y) points."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


class Run:
    """One run of all bars: records to a file, verdicts to a table."""

    def __init__(self, out: Path, device: str) -> None:
        self.file = out.open("a", encoding="utf-8")
        self.device = device
        self.cpu = device == "cpu"
        self.samples = 2 if self.cpu else 30
        self.roof: list[tuple[float, float]] = []
        self.table: list[tuple[str, float, str, bool]] = []
        self.lines: dict[str, Line] = {}
        self.figures: list[str] = []
        self.not_measured: list[str] = []

    def emit(self, record: dict) -> None:
        """Append `record` to the file, at once."""
        if "seq_lens" in record and len(set(record["seq_lens"])) == 1:
            lengths = record.pop("seq_lens")
            record = {**record, "batch_size": len(lengths), "context_tokens": lengths[0]}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def bar(self, name: str, value: float, bound: str) -> None:
        """Record a figure and whether it is within `bound`, such as ">= 0.99"."""
        sign, limit = bound.split()
        passed = value >= float(limit) if sign == ">=" else value <= float(limit)
        self.table.append((name, value, bound, passed))
        self.emit({"kind": "bar", "name": name, "value": value, "bound": bound, "passed": passed})

    def environment(self) -> None:
        """Record where and with what this run is taken."""
        gpu = None if self.cpu else torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.emit({"kind": "environment", "gpu": gpu, "time": stamp, "device": self.device, **versions})

    def read(self) -> float:
        """Measure the roofline; returns the bytes/s of its slope."""
        sizes = (1 << 16, 1 << 17) if self.cpu else roofline.SIZES_BYTES
        if self.cpu:
            self.roof = [(float(n), n / 1e9) for n in sizes]
            return 1e9
        records = roofline.measure(sizes_bytes=sizes, device=self.device)
        for record in records:
            self.emit(record)
        self.roof = [(r["read_bytes"], r["time_s"]) for r in records]
        slope, intercept = fit(self.roof)
        self.emit({"kind": "roofline_line", "bytes_per_s": 1 / slope, "intercept_s": intercept})
        return 1 / slope

    def roof_time(self, read_bytes: float) -> float:
        """Seconds the read kernel needs for as many bytes (linear between and beyond the measured sizes)."""
        slope, intercept = fit(self.roof)
        for (x0, y0), (x1, y1) in zip(self.roof, self.roof[1:], strict=False):
            if x0 <= read_bytes <= x1:
                return y0 + (y1 - y0) * (read_bytes - x0) / (x1 - x0)
        return intercept + slope * read_bytes

    def cell(self, cell: DecodeCell) -> dict:
        """Time one cell; keeps its fraction of the roofline when it reads 1 GB or more."""
        if self.cpu:
            cell = replace(cell, seq_lens=tuple(max(1, n // 4096) for n in cell.seq_lens[:2]), num_kv_heads=1)
        record = decode.measure(cell, device=self.device, samples=self.samples, warmup=20)
        record["roofline_fraction"] = self.roof_time(record["read_bytes"]) / record["time_s"]
        self.emit(record)
        return record

    def gate(self, name: str, cell: DecodeCell) -> None:
        """Compare the kernel of `cell` with the reference; SystemExit, naming the family, when it is off."""
        if self.cpu:
            verdict = decode.gate(replace(cell, num_kv_heads=2), device=self.device, seq_lens=(40, 7))
        else:
            verdict = decode.gate(cell, device=self.device)
        self.emit(verdict)
        if not verdict["passed"]:
            raise SystemExit(f"{name}: error {verdict['error']:.1e} above {verdict['tolerance']:.1e}; nothing timed")

    def chosen(self, name: str, cell: DecodeCell) -> DecodeCell:
        """`cell` with its fastest configuration, gated if that is not the family's default."""
        cell = replace(cell, config=choose(cell, device=self.device))
        if not is_default(cell, self.device):
            self.gate(name, cell)
        return cell

    def family(self, name: str, batch: int = 16, **kind: object) -> tuple[Line, DecodeCell]:
        """Gate a family of cells, choose its configuration, fit its line over the contexts."""
        cell = DecodeCell((CONTEXTS[0],) * batch, **kind)
        self.gate(name, cell)
        cell = self.chosen(name, cell)
        points = []
        for context in CONTEXTS:
            record = self.cell(replace(cell, seq_lens=(context,) * batch))
            points.append((record["read_bytes"], record["time_s"], record["roofline_fraction"]))
        slope, intercept = fit([p[:2] for p in points])
        per_token = slope * points[-1][0] / (CONTEXTS[-1] if not self.cpu else 16)
        line = Line(1 / slope, intercept, per_token)
        self.lines[name] = line
        self.emit({"kind": "line", "name": name, "batch_size": batch, **kind, **line.__dict__})
        large = [fraction for read_bytes, _, fraction in points if read_bytes >= 1e9]
        self.emit({"kind": "absolute", "name": name, "batch_size": batch, "lowest_from_1_gb": min(large, default=None)})
        if large and name in HELD_FROM_1_GB:
            self.bar(f"{name} lowest fraction of the roofline from 1 GB on", min(large), ">= 0.97")
        return line, cell

    def main_bars(self, roof: float) -> None:
        """head_dim 128, 8 KV heads, 8 query heads each, contexts 8k to 64k."""
        bf16, bf16_cell = self.family("bf16 HND", kv_dtype="bf16", scale_granularity="none")
        self.bar("bf16 HND slope / roofline", bf16.bytes_per_s / roof, ">= 0.99")
        self.bar("bf16 HND intercept us", bf16.intercept_s * 1e6, "<= 12")
        for name, kind, ratio in (
            ("fp8 tensor HND", {"scale_granularity": "tensor"}, 0.505),
            ("fp8 head HND", {"scale_granularity": "head"}, 0.505),
            ("fp8 token_head HND", {"scale_granularity": "token_head"}, 0.515625 * 1.01),
            ("int8 token_head HND", {"kv_dtype": "int8", "scale_granularity": "token_head"}, 0.515625 * 1.01),
            ("fp8 inline HND", {"scale_granularity": "token_head_inline"}, 0.5625 * 1.01),
            ("fp8 e5m2 tensor HND", {"kv_dtype": "fp8_e5m2", "scale_granularity": "tensor"}, 0.505),
        ):
            line, _ = self.family(name, **kind)
            self.bar(f"{name} slope / roofline", line.bytes_per_s / roof, ">= 0.99")
            self.bar(f"{name} slope / bf16 slope", line.slope_s_per_token / bf16.slope_s_per_token, f"<= {ratio:.4f}")
            self.bar(f"{name} intercept us", line.intercept_s * 1e6, "<= 12")
        wide, _ = self.family("bf16 HND batch 32", batch=32, kv_dtype="bf16", scale_granularity="none")
        narrow, _ = self.family("fp8 tensor HND batch 32", batch=32)
        self.bar("batch 32 fp8 slope / bf16 slope", narrow.slope_s_per_token / wide.slope_s_per_token, "<= 0.505")
        self.bar("batch 32 bf16 slope / roofline", wide.bytes_per_s / roof, ">= 0.99")
        self.bar("batch 32 fp8 slope / roofline", narrow.bytes_per_s / roof, ">= 0.99")
        for name, kind in (
            ("bf16 NHD", {"kv_dtype": "bf16", "scale_granularity": "none"}),
            ("fp8 tensor NHD", {}),
            ("fp8 token_head NHD", {"scale_granularity": "token_head"}),
        ):
            line, _ = self.family(name, layout="NHD", **kind)
            self.bar(f"{name} slope / roofline", line.bytes_per_s / roof, ">= 0.96")
        inline, _ = self.family("fp8 inline NHD", layout="NHD", scale_granularity="token_head_inline")
        self.bar("fp8 inline NHD slope / bf16 slope", inline.slope_s_per_token / bf16.slope_s_per_token, "<= 0.5681")
        for kv_dtype in ("int4", "nvfp4"):
            line, _ = self.family(f"{kv_dtype} HND", kv_dtype=kv_dtype, scale_granularity="block")
            self.bar(f"{kv_dtype} HND slope / bf16 slope", line.slope_s_per_token / bf16.slope_s_per_token, "<= 0.30")
        alone = self.cell(self.chosen("bf16 alone", replace(bf16_cell, seq_lens=(131072,))))
        self.bar("batch 1 x 128k bf16 / roofline", alone["roofline_fraction"], ">= 0.90")

    def shape_bars(self, roof: float) -> None:
        """Other shapes with fp8 and one scale for the cache."""
        usual, cell = self.family("fp8 tensor HND again")
        alone = self.cell(self.chosen("fp8 alone", replace(cell, seq_lens=(131072,))))
        self.bar("batch 1 x 128k fp8 / roofline", alone["roofline_fraction"], ">= 0.90")
        self.bar(
            "mixed lengths fp8 / roofline", self.cell(replace(cell, seq_lens=MIXED))["roofline_fraction"], ">= 0.93"
        )
        small, _ = self.family("fp8 block 16", block_size_tokens=16)
        self.bar("fp8 block 16 slope / block 64 slope", small.slope_s_per_token / usual.slope_s_per_token, "<= 1.02")
        for kind in (
            {"group_size": 1},
            {"group_size": 4},
            {"group_size": 16},
            {"head_dim": 64},
            {"head_dim": 80},
            {"head_dim": 256},
        ):
            ((what, value),) = kind.items()
            line, _ = self.family(f"fp8 {what} {value}", **kind)
            self.bar(f"fp8 {what} {value} slope / roofline", line.bytes_per_s / roof, ">= 0.95")
            line, _ = self.family(f"bf16 {what} {value}", kv_dtype="bf16", scale_granularity="none", **kind)
            self.bar(f"bf16 {what} {value} slope / roofline", line.bytes_per_s / roof, ">= 0.95")

    def latent_figures(self, batch: int = 32) -> None:
        """Latent decode of a rank of 16 heads and of all 128: slopes, which no bar holds."""
        contexts = (16, 48) if self.cpu else (16384, 65536)
        lengths = (40, 7) if self.cpu else latent.GATE_LENGTHS
        for num_heads in (16,) if self.cpu else (16, 128):
            for kv_dtype in FORMAT_CODES:
                cell = latent.MlaCell((1,) * (2 if self.cpu else batch), kv_dtype=kv_dtype, num_heads=num_heads)
                verdict = latent.gate(cell, device=self.device, seq_lens=lengths)
                self.emit(verdict)
                if not verdict["passed"]:
                    raise SystemExit(f"latent {kv_dtype}: error {verdict['error']:.1e}; nothing timed")
                points = []
                for context in contexts:
                    seq_lens = (context,) * len(cell.seq_lens)
                    record = latent.measure(replace(cell, seq_lens=seq_lens), device=self.device, samples=self.samples)
                    self.emit(record)
                    points.append((record["read_bytes"], record["time_s"]))
                rate = 1 / fit(points)[0]
                self.emit({"kind": "latent_line", "kv_dtype": kv_dtype, "num_heads": num_heads, "bytes_per_s": rate})
                self.figures.append(f"latent {kv_dtype}, {num_heads} heads: slope {rate / 1e12:.2f} TB/s")

    def peer_bars(self, batch: int = 16) -> None:
        """FlashAttention-3 and XQA on the same caches, where they are installed: their slopes over ours."""
        kinds = (("bf16", {"kv_dtype": "bf16", "scale_granularity": "none"}), ("fp8 tensor", {}))
        for name in peers.PEERS:
            if self.cpu or (reason := peers.missing(name)):
                self.not_measured.append(f"{name}: {'it needs a GPU' if self.cpu else reason}")
                continue
            for layout in ("HND", "NHD"):
                for kind, options in kinds:
                    cell = DecodeCell((CONTEXTS[0],) * batch, layout=layout, **options)
                    try:
                        records = [peers.measure(name, replace(cell, seq_lens=(n,) * batch)) for n in CONTEXTS]
                    except (ImportError, RuntimeError) as error:
                        self.not_measured.append(f"{name}, {kind} {layout}: {str(error).splitlines()[0]}")
                        continue
                    for record in records:
                        self.emit(record)
                    slope, _ = fit([(r["read_bytes"], r["time_s"]) for r in records])
                    wanted = 1.3 if (name, kind) == ("vllm", "fp8 tensor") else 1.0
                    ratio = slope * self.lines[f"{kind} {layout}"].bytes_per_s
                    self.bar(f"{records[0]['label']} slope / ours, {kind} {layout}", ratio, f">= {wanted}")


def main(arguments: list[str] | None = None) -> None:
    """Run all bars and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("kernel-bars.jsonl"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.exit(4, "no CUDA GPU found; --device cpu runs the same steps in Triton's interpreter\n")
    run = Run(parsed.output, parsed.device)
    run.environment()
    roof = run.read()
    run.main_bars(roof)
    run.shape_bars(roof)
    run.peer_bars()
    run.latent_figures()
    if not run.cpu:
        run.read()
    if run.cpu:
        print("A CPU is not a GPU: these figures only show that every step runs.")
    for name, value, bound, passed in run.table:
        verdict = "  --" if run.cpu else "pass" if passed else "MISS"
        print(f"{verdict}  {value:10.4f}  {bound:>10}  {name}")
    for line in run.figures:
        print(f"      {line}")
    for line in run.not_measured:
        print(f"not measured  {line}")


if __name__ == "__main__":
    main()
