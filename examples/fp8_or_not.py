"""What FP8 KV really buys on a deployment: bytes, scales, users, and why it is less than claimed.

Run: python examples/fp8_or_not.py [MODEL] [GPU] [TP] [CONTEXT]
"""

from __future__ import annotations

import signal
import sys

import kvplan


def main(model: str = "qwen3.5-27b", gpu: str = "h100", tp: str = "1", context: str = "64k") -> None:
    plan = kvplan.size(model=model, gpu=gpu, tp_size=int(tp), context_tokens=context)
    print(f"{model} on {tp} × {gpu}, {plan.answers.context_tokens:,} tokens a request")
    for row in plan.comparison:
        if row.forbidden is not None:
            print(f"  {row.kv_cache_dtype:<20} not possible: {row.forbidden}")
            continue
        gain = (
            f"{row.effective_gain:.2f}x of {row.advertised_gain:.1f}x" if row.effective_gain else "no 16-bit to compare"
        )
        print(
            f"  {row.kv_cache_dtype:<20} {row.max_batch_at_context:>4} users, gain {gain}, scales {row.scale_share:.1%}"
        )
    for dtype in ("fp8", "fp8_per_token_head"):
        for advice in kvplan.size(
            model=model, gpu=gpu, tp_size=int(tp), context_tokens=context, kv_cache_dtype=dtype
        ).advice:
            print(f"{dtype}: {advice.message}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly under `| head`
    main(*sys.argv[1:])
