"""The read roofline of the GPU at hand: seconds and bytes/s over several sizes."""

import torch

from ..read_roofline import CONFIGS, ReadConfig, programs, read_roofline
from .timing import time_calls

SIZES_BYTES = (1 << 28, 1 << 29, 1 << 30, 1 << 31, 1 << 32)


def measure(
    sizes_bytes: tuple[int, ...] = SIZES_BYTES,
    configs: tuple[ReadConfig, ...] = CONFIGS,
    device: str = "cuda",
    samples: int = 30,
) -> list[dict]:
    """One record a size: the fastest of `configs` with its time; every record keeps the times of all of them.

    Sizes are rounded down to whole blocks. Small sizes rotate among disjoint buffers of 2 GB together.
    """
    quantum = max(c.block for c in configs) * 4
    pool = torch.randint(-(2**31), 2**31 - 1, (max(1 << 31, *sizes_bytes) // 4,), dtype=torch.int32, device=device)
    out = torch.empty(max(programs(pool.device, c) for c in configs), dtype=torch.int32, device=device)
    records = []
    for size in sizes_bytes:
        words = size // quantum * quantum // 4
        parts = [pool[i * words : (i + 1) * words] for i in range(max(1, min(8, len(pool) // words)))]
        times = {
            c: time_calls([lambda p=p, c=c: read_roofline(p, out, c) for p in parts], device=device, samples=samples)
            for c in configs
        }
        best = min(times, key=lambda c: times[c].median_s)
        records.append(
            {
                "kind": "read_roofline",
                **times[best].record(words * 4),
                "config": str(best),
                "all_times_s": {str(c): t.median_s for c, t in times.items()},
            }
        )
    return records
