"""Times of launches as a CUDA graph replays them."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 10th and 90th percentile over `samples` replays; SM clock afterwards (None: unknown)."""

    median_s: float
    p10_s: float
    p90_s: float
    samples: int
    sm_clock_hz: float | None

    def record(self, read_bytes: int | None = None) -> dict:
        """The fields of a benchmark's record, with the bytes a call reads and their rate where it reads any."""
        found = {
            "time_s": self.median_s,
            "p10_s": self.p10_s,
            "p90_s": self.p90_s,
            "samples": self.samples,
            "sm_clock_hz": self.sm_clock_hz,
        }
        if read_bytes is not None:
            found |= {"read_bytes": read_bytes, "bytes_per_s": read_bytes / self.median_s}
        return found


def sm_clock_hz() -> float | None:
    """The SM clock now; None where the driver does not tell."""
    with contextlib.suppress(Exception):
        return torch.cuda.clock_rate() * 1e6
    return None


def _summary(seconds: list[float], clock: float | None) -> Timing:
    ordered = sorted(seconds)
    n = len(ordered)
    return Timing(ordered[n // 2], ordered[n // 10], ordered[n - 1 - n // 10], n, clock)


def time_calls(calls: Sequence[Callable[[], object]], *, device: str, warmup: int = 8, samples: int = 30) -> Timing:
    """Seconds of one of `calls`, which run in turn.

    On a GPU they are captured once into one graph; give each call its own buffers, together several times the L2 cache,
    or the cache is what gets measured. On a CPU they are called and timed one round at a time.
    """
    if torch.device(device).type != "cuda":
        rounds = []
        for i in range(1 + min(samples, 5)):
            begin = time.perf_counter()
            for call in calls:
                call()
            if i:
                rounds.append((time.perf_counter() - begin) / len(calls))
        return _summary(rounds, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(warmup):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    clock = sm_clock_hz()
    torch.cuda.synchronize()
    return _summary([b.elapsed_time(e) * 1e-3 / len(calls) for b, e in marks], clock)
