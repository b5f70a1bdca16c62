"""What a run is asked to measure: the caller's options, and the request they make on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvplan.errors import InputError, UnsupportedError, shorten
from kvplan.measure.backend import Backend, Environment
from kvplan.measure.family import Shape, checked_shape, model_shapes, parse_kv_dtypes
from kvplan.measure.plan import MAX_SEED, PEERS, WEIGHT_BYTES, MeasureRequest
from kvplan.measure.step_plan import step_model

DEFAULT_KV_DTYPES = ("bf16", "fp8", "fp8_per_token_head")
LATENT_KV_DTYPES = ("bf16", "fp8", "fp8_ds_mla")
FIRST_FP8_ARCHITECTURE = 89


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
    weight_dtype: str | None = None


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
    if options.seed > MAX_SEED:
        raise InputError(f"--seed {shorten(options.seed, 40)} is more than {MAX_SEED:,}")
    if options.weight_dtype is not None and not options.whole_step:
        raise InputError("--weight-dtype is of whole steps: attention has no weights", hint="add --whole-step")
    weight_dtype = _weight_dtype(options.weight_dtype or "bf16", backend.environment)
    if options.whole_step:
        if options.model is None or options.tp_size != 1:
            raise InputError("--whole-step runs a whole model on one GPU", hint="add --model 8b, and leave out --tp")
        shapes = (step_model(options.model).shape,)
    steps = (options.context_tokens or defaults.step_contexts) if options.whole_step else ()
    latent = shapes[0].latent_dim is not None
    kv_dtypes = options.kv_dtypes or (LATENT_KV_DTYPES if latent else DEFAULT_KV_DTYPES)
    request = MeasureRequest(
        shapes, parse_kv_dtypes(kv_dtypes, latent), options.batch_sizes or defaults.batch_sizes,
        options.context_tokens or contexts, options.effort, "cpu" if backend.environment.kind == "cpu" else "cuda",
        options.compare, options.seed, options.model, options.tp_size if options.model else None, steps, weight_dtype,
    )  # fmt: skip
    for family in request.families:
        family.check()
    return request


def _weight_dtype(name: str, environment: Environment) -> str:
    """A weight format that whole steps run with on this device."""
    found = name.strip().lower()
    if found not in WEIGHT_BYTES:
        raise InputError(
            f"--weight-dtype {shorten(name, 20)!r}: whole steps run with {' or '.join(WEIGHT_BYTES)} weights"
        )
    architecture = environment.architecture or ""
    old = environment.kind == "cuda" and int(architecture.removeprefix("sm") or 0) < FIRST_FP8_ARCHITECTURE
    if found == "fp8" and (old or environment.kind == "rocm"):
        raise UnsupportedError(
            f"fp8 weights: {environment.device_name} ({architecture}) has no FP8 matrix product that torch's scaled_mm "
            "takes here", hint=f"sm{FIRST_FP8_ARCHITECTURE} and later have; --weight-dtype bf16 runs",
        )  # fmt: skip
    return found
