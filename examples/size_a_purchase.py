"""Which GPUs to buy for a model, a context and a number of users: the fewest of each, and what they hold.

Run: python examples/size_a_purchase.py [MODEL] [CONTEXT] [USERS]
"""

from __future__ import annotations

import signal
import sys

import kvplan
from kvplan.units import format_gib


def main(model: str = "llama-3.1-70b", context: str = "32k", users: str = "64") -> None:
    for dtype in ("bf16", "fp8"):
        plan = kvplan.size(model=model, context_tokens=context, batch_size=int(users), kv_cache_dtype=dtype)
        needed = format_gib(plan.answers.kv_needed_bytes)
        print(f"{users} users of {model} at {plan.answers.context_tokens:,} tokens, {dtype} KV: {needed}")
        fitting = [row for row in plan.gpus if row.num_gpus is not None]
        for row in sorted(fitting, key=lambda row: row.num_gpus * row.memory_bytes):
            print(f"  {row.num_gpus:>3} × {row.display_name:<55} {row.layout:<10} holds {row.max_batch_at_context:,}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly under `| head`
    main(*sys.argv[1:])
