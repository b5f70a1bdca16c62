"""What a run is asked to measure: the caller's options, and the request they make on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvplan.errors import InputError
from kvplan.measure.backend import Backend
from kvplan.measure.plan import MeasureRequest, Shape, checked_shape, model_shapes, parse_kv_dtypes
from kvplan.measure.step_plan import step_model

DEFAULT_KV_DTYPES = ("bf16", "fp8", "fp8_per_token_head")
PEERS = {"torch": "torch SDPA", "flashinfer": "FlashInfer XQA", "vllm": "vLLM FlashAttention-3"}
"""What ``--compare`` can put beside ours, and how it is called in reports."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller said; None and empty mean what suits the device."""

    model: str | None = None
    tp_size: int = 1
    num_q_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    kv_dtypes: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    context_tokens: tuple[int, ...] = ()
    effort: str = "quick"
    budget_s: float | None = None
    run_dir: Path | None = None
    resume: Path | None = None
    device: str = "auto"
    compare: tuple[str, ...] = ()
    tolerance: float = 0.10
    calibrate: bool = True
    seed: int = 0
    whole_step: bool = False


def resolve_request(options: Options, backend: Backend) -> MeasureRequest:
    """``options`` with the device's defaults filled in.

    Raises:
        InputError: shapes, formats or sizes that the kernels do not take.

    """
    defaults = backend.defaults
    heads = (options.num_q_heads, options.num_kv_heads, options.head_dim)
    if options.model is not None:
        if any(heads):
            raise InputError("--model and head counts name two shapes", hint="leave out one of them")
        shapes = model_shapes(options.model, options.tp_size)
    else:
        q, kv, dim = options.num_q_heads, options.num_kv_heads, options.head_dim
        kv_heads = kv or (defaults.num_kv_heads if q is None or q >= defaults.num_kv_heads else q)
        q_heads = q or kv_heads * (defaults.num_q_heads // defaults.num_kv_heads)
        shapes = (checked_shape(Shape(q_heads, kv_heads, dim or defaults.head_dim)),)
    contexts = defaults.quick_contexts if options.effort == "quick" else defaults.thorough_contexts
    for name in options.compare:
        if name not in PEERS:
            raise InputError(f"--compare {name!r} is not known", hint=f"known: {', '.join(PEERS)}")
    if options.whole_step:
        if options.model is None or options.tp_size != 1:
            raise InputError("--whole-step runs a whole model on one GPU", hint="add --model 8b, and leave out --tp")
        shapes = (step_model(options.model).shape,)
    steps = (options.context_tokens or defaults.step_contexts) if options.whole_step else ()
    request = MeasureRequest(
        shapes, parse_kv_dtypes(options.kv_dtypes or DEFAULT_KV_DTYPES), options.batch_sizes or defaults.batch_sizes,
        options.context_tokens or contexts, options.effort, "cpu" if backend.environment.kind == "cpu" else "cuda",
        options.compare, options.seed, options.model, options.tp_size if options.model else None, steps,
    )  # fmt: skip
    for family in request.families:
        family.check()
    return request
