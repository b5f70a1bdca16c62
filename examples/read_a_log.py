"""Read a start-up log: does the server do what was planned, and what would FP8 and a second GPU make of it?"""

import signal
from pathlib import Path

import kvplan

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly under `| head`
LOG = Path(__file__).parent / "vllm-startup.log"
GIB = 2**30


def shown(value: object, unit: str) -> str:
    if unit == "bytes":
        return f"{value / GIB:.2f} GiB"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


result = kvplan.check_log(LOG, gpu="a100-80gb-sxm", kv_cache_dtype="bf16", context_tokens="32k", batch_size=12)
print(f"{result.verdict}: {len(result.terms)} terms of {result.report.engine}")
for term in result.terms:
    print(
        f"  {term.label:20} planned {shown(term.planned, term.unit):>12}   observed {shown(term.observed, term.unit)}"
    )
for cause in result.causes:
    print(f"  {cause.message}: {cause.fix}")

print("\nwhat if, from the server's own numbers, at 32,768 tokens a request:")
changes = [{}, {"kv_cache_dtype": "fp8"}, {"tp_size": 2}, {"tp_size": 2, "kv_cache_dtype": "fp8"}]
for change in changes:
    # A100s store FP8 in 8 bits and compute in 16: capacity doubles, speed does not
    plan = kvplan.size_from_log(LOG, gpu="a100-80gb-sxm", context_tokens="32k", **change)
    what = ", ".join(f"{name}={value}" for name, value in change.items()) or "as it is"
    kv = plan.memory.kv_cache_bytes / GIB
    print(f"  {what:32} {kv:6.2f} GiB of KV, {plan.answers.max_batch_at_context:3} requests at once")
