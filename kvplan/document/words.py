"""Sentences of a report: the answer an operations lead signs, in plain words, every number from the document."""

from __future__ import annotations

from kvplan.document.parts import Answers, Deployment, Interval, KernelRatio, Latency, Precision
from kvplan.latency.lines import BREAK_EVEN_GAIN
from kvplan.units import format_count, format_gib, format_percent, format_ratio, format_tokens

KERNEL_LOSS = 1.03
"""Slope over what bytes alone would give, from which on a kernel is said to lose something."""


def users(count: int) -> str:
    """``1 user``, ``64 users``."""
    return format_count(count, "user")


def hardware(deployment: Deployment) -> str:
    """``4 × NVIDIA H200 SXM 141GB (TP 4)``."""
    return f"{deployment.num_gpus} × {deployment.gpu_name} ({deployment.layout})"


def headline(deployment: Deployment, fits: bool, max_users: int, kv_bytes: int, too_long_tokens: int | None,
             limit: str = "") -> str:  # fmt: skip
    """Yes or no, who, how long, on what.

    ``too_long_tokens`` is the longest request when that alone does not fit; ``limit`` is what ``running_limit`` says.
    """
    d = deployment
    at = f"{format_tokens(d.context_tokens)} tokens"
    on = f"on {hardware(d)} with {d.kv_cache_dtype} KV"
    if kv_bytes <= 0:
        return f"No: the weights of {d.model} leave no memory for KV on {hardware(d)}."
    if too_long_tokens is not None:
        longest = format_tokens(too_long_tokens)
        return f"No: {d.engine} does not start, for its longest request, {longest} tokens, does not fit {on}."
    if not fits and max_users == 0:
        return f"No: not one user at {at} fits {on}."
    if not fits:
        asked = users(d.num_users or 1)
        return f"No: {asked} at {at} each do not fit {on}; {max_users:,} would."
    if d.num_users is None:
        return f"Yes: {d.model} serves up to {users(max_users)} at {at} each {on}{limit}."
    more = max_users - d.num_users
    room = f", with room for {more:,} more" if more else ", with no room for another"
    return f"Yes: {d.model} serves {users(d.num_users)} at {at} each {on}{room}{limit}."


def running_limit(deployment: Deployment, max_users: int, held_users: int, running: int | None, told: bool) -> str:
    """What of the users that memory holds the engine runs at once, where that is fewer; ``told`` or by its default."""
    if told:
        more = f"; its --max-num-seqs runs no more at once, memory holds {held_users:,}"
        return more if max_users < held_users else ""
    if running is None or running >= max_users:
        return ""
    return f"; {deployment.engine} runs {running:,} at once unless told"


def beyond_gpu(deployment: Deployment, kv_bytes: int, excess_bytes: int) -> str:
    """No, for the KV bytes that were given are not there."""
    return (
        f"No: {format_gib(kv_bytes)} of KV are {format_gib(excess_bytes)} more than each GPU has left beside "
        f"{deployment.model} on {hardware(deployment)}."
    )


def not_at_once(deployment: Deployment, served_users: int, held_users: int) -> str:
    """No, for the scheduler was told to run fewer at once."""
    d = deployment
    return (
        f"No: {users(d.num_users or 1)} at {format_tokens(d.context_tokens)} tokens each do not run at once on "
        f"{hardware(d)}: its --max-num-seqs runs {served_users:,}, and the rest wait; memory holds {held_users:,}."
    )


def instead_of(refused: str, deployment: Deployment, instead: str) -> str:
    """What a report is about whose KV format is refused: the format the model gets by default, and its headline."""
    return f"With {deployment.kv_cache_dtype} KV in place of {refused}, which all below is about: {instead}"


def answer_sentences(deployment: Deployment, answers: Answers, held_users: int) -> list[str]:
    """What the headline rests on: capacity (users held, run or not), headroom, speed now, speed at the limit."""
    found = [_capacity(deployment, answers, held_users)]
    if answers.kv_headroom_bytes is not None and (answers.kv_cache_bytes or 0) > 0:
        found.append(_headroom(deployment, answers))
    if answers.basis.problem is not None:
        found.append(f"Speed is unknown: {answers.basis.problem}.")
        return found
    if answers.now is not None:
        found.append(_speed(answers.now, deployment))
        found += _waiting(answers.now, deployment)
    if answers.limit is not None and (answers.now is None or answers.limit.num_users != answers.now.num_users):
        limit = answers.limit
        load = f"under load {interval(limit.tpot)} on average, the first after {interval(limit.ttft)}"
        found.append(f"At the limit, {users(limit.num_users)}: {interval(limit.itl)}; {load}.")
    if answers.basis.source == "assumed":
        found.append(
            f"These times are assumed, not calibrated: {answers.basis.detail}. Measure before signing for them."
        )
    return found


def _capacity(deployment: Deployment, answers: Answers, held_users: int) -> str:
    exact = "exact" if deployment.rules == "exact" else "approximate"
    rules = f"{deployment.engine} {deployment.engine_version}, {exact} rules"
    if (answers.kv_cache_bytes or 0) <= 0:
        return f"Weights and the engine's own memory need more than each GPU offers ({rules})."
    text = f"The KV cache, {format_gib(answers.kv_cache_bytes)} on each GPU, holds {users(held_users)} at "
    text += f"{format_tokens(deployment.context_tokens)} tokens"
    asked = deployment.num_users or 1
    if answers.max_users < held_users:
        text += f", of which --max-num-seqs lets {answers.max_users:,} run at once"
    if asked > answers.max_users and answers.max_users < held_users:
        return f"{text} ({rules})."
    if answers.max_context_tokens is None:
        return f"{text} and not one token for {users(asked)} ({rules})."
    if answers.max_context_tokens != deployment.context_tokens:
        text += f", or {users(asked)} at up to {format_tokens(answers.max_context_tokens)} tokens"
    return f"{text} ({rules})."


def _headroom(deployment: Deployment, answers: Answers) -> str:
    free = answers.kv_headroom_bytes or 0
    who = users(deployment.num_users or 1)
    if free < 0:
        return f"For {who}, {format_gib(-free)} of KV are missing on each GPU."
    share = free / answers.kv_cache_bytes if answers.kv_cache_bytes else 0
    return f"With {who}, {format_gib(free)} of KV stay free on each GPU ({format_percent(share, 0)} of it)."


def _speed(latency: Latency, deployment: Deployment) -> str:
    prompt, answer = format_tokens(deployment.input_tokens), format_tokens(deployment.output_tokens)
    load = f"prompts of {prompt} and answers of {answer} tokens{'' if deployment.lengths_given else ' (assumed)'}"
    return (
        f"Now, {users(latency.num_users)}: a token every {interval(latency.itl)} when all are at "
        f"{format_tokens(latency.context_tokens)} tokens; under load, with {load}, a token every "
        f"{interval(latency.tpot)} on average and the first after {interval(latency.ttft)}."
    )


def _waiting(latency: Latency, deployment: Deployment) -> list[str]:
    """A warning where the memory is there but prompts queue: the first token takes longer than the answer after it."""
    if latency.ttft.value_s <= latency.tpot.value_s * deployment.output_tokens:
        return []
    return [
        f"Under that load a user waits longer for the first token than for the whole answer after it: prompts of "
        f"{format_tokens(deployment.input_tokens)} tokens come faster than they are read. Fewer users at once, more "
        "GPUs or shorter prompts shorten the wait."
    ]


def seconds(value: float | None) -> str:
    """Three significant digits, labelled: ``48.4 ms``, ``1.94 s``, ``812 µs``."""
    if value is None:
        return "unknown"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit * 0.9995 or name == "µs":
            scaled = value / unit
            return f"{scaled:,.0f} {name}" if scaled >= 99.95 else f"{scaled:#.3g} {name}"
    raise AssertionError


def interval(value: Interval) -> str:
    """``48.4 ms (38.6 ms to 58.7 ms)``."""
    return f"{seconds(value.value_s)} ({seconds(value.low_s)} to {seconds(value.high_s)})"


def fp8_sentences(small: Precision | None, base: Precision | None, refused: list[Precision], kernels: list[KernelRatio],
                  engine: str) -> list[str]:  # fmt: skip
    """What a smaller KV format really buys here: capacity, slope, where it starts to pay, and the kernel's part."""
    if small is None:
        reasons = [f"{p.kv_cache_dtype}: {p.forbidden}" for p in refused]
        return [f"No smaller KV format can be used here ({'; '.join(reasons)})." if reasons
                else "No smaller KV format was compared."]  # fmt: skip
    found = [_gain(small, base)]
    name = small.kv_cache_dtype
    if small.slope_ratio is None:
        why = small.latency_problem or small.slope_ratio_detail or "nothing is predicted for this GPU"
        return [*found, f"What {name} does to speed is unknown: {why}."]
    found.append(_slope(small))
    if small.break_even_tokens is None:
        found.append(f"It never saves {format_percent(BREAK_EVEN_GAIN, 0)} of the time of a token.")
    else:
        found.append(f"Below {format_tokens(small.break_even_tokens)} tokens in flight (users × context) it saves less "
                     f"than {format_percent(BREAK_EVEN_GAIN, 0)} of the time of a token.")  # fmt: skip
    if small.measured_slope_ratio is not None:
        measured = format_ratio(small.measured_slope_ratio)
        found.append(f"Measured on this GPU with kvplan's own kernels: {measured} the 16-bit slope.")
    others = [k for k in kernels if k.engine != engine and k.slope_ratio < small.slope_ratio - 0.03]
    if others:
        best = min(others, key=lambda kernel: kernel.slope_ratio)
        found.append(f"The fp8 kernels of {best.engine} reach {format_ratio(best.slope_ratio)} on this GPU.")
    return found


def _gain(small: Precision, base: Precision | None) -> str:
    name = small.kv_cache_dtype
    if small.capacity_gain is None or base is None:
        return f"{name} holds {users(small.max_users or 0)}; 16-bit KV cannot be used here, so there is no ratio."
    text = f"{name} KV holds {format_ratio(small.capacity_gain)} as many tokens as 16-bit KV"
    is_less = small.claimed_gain is not None and small.capacity_gain < small.claimed_gain * 0.995
    if is_less:
        text += f", not the claimed {format_ratio(small.claimed_gain, 0)}"
    if small.scale_share:
        scales = f"scales take {format_percent(small.scale_share)}"
    else:
        rest = "; what is not keys and values keeps its size" if is_less else " here"
        scales = f"its scales take nothing{rest}"
    held, before = small.max_users or 0, base.max_users or 0
    return (
        f"{text} ({scales})."
        if not held or held == before
        else f"{text} ({scales}): {users(held)} instead of {before:,}."
    )


def _slope(small: Precision) -> str:
    ratio, floor = small.slope_ratio or 0.0, small.bytes_ratio
    text = f"Each token of context costs {format_ratio(ratio)} the time of 16-bit KV ({small.slope_ratio_source})"
    if floor is not None and ratio > floor * KERNEL_LOSS:
        text += f"; its bytes alone would make that {format_ratio(floor)}"
        text += ": the kernel loses the rest" if small.slope_ratio_source == "calibrated" else ""
    return f"{text}."
