"""From a latency request to ``Served``: every name looked up, and what was read into the request said.

Done once for all points of a deployment.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from kvplan.deployment import NVLINK_NODE_GPUS, Deployment, resolve_deployment
from kvplan.errors import InputError, shorten
from kvplan.gpu import GpuSpec, resolve_gpu
from kvplan.latency.kv import assumed_kv_dtype, calibration_notes, is_latent, kv_speed
from kvplan.latency.latent import latent_bytes_ratio, latent_heads
from kvplan.latency.parameters import Traits
from kvplan.latency.request import ItlRequest, resolve_model_or_sibling
from kvplan.latency.served import Served
from kvplan.memory.engines import ENGINES, parse_version, resolve_engine
from kvplan.memory.setup import Setup, budget_of, cache_plan, set_up, weights_of
from kvplan.model_config.types import ModelConfig
from kvplan.roofline import peaks_of
from kvplan.traffic import make_traffic, weight_dtypes
from kvplan.weights import stored_format

SPECULATIVE = {
    ("tensorrt-llm", "deepseek-r1", "1.1.0rc2.post2"),
    ("tensorrt-llm", "deepseek-r1", "1.2.0rc6.post3"),
}
"""(engine, model, version) whose public measurements ran multi-token prediction, though no label says so: the same
deployment of DeepSeek-V3, or of another version, takes 1.3 to 2.3 times as long (most at few clients), with a shorter
TTFT."""


@lru_cache(maxsize=4096)
def serve(request: ItlRequest) -> Served:
    """Look everything up for one deployment; remembered.

    Raises:
        KvplanError: a name is unknown, the engine refuses the combination, or the GPU's bandwidth is not known.

    """
    size = request.size
    assert size.model is not None and size.gpu is not None
    model, told, note = resolve_model_or_sibling(size.model)
    notes = [note] if note else []
    engine, gpu = resolve_engine(size.engine).name, resolve_gpu(size.gpu)
    dtype = size.weight_dtype or told
    deployment = resolve_deployment(
        is_moe=model.is_moe, tp_size=size.tp_size, pp_size=size.pp_size, dp_size=size.dp_size, ep=size.ep,
        attention_dp_size=request.attention_dp_size, moe_tp_size=request.moe_tp_size, moe_ep_size=request.moe_ep_size,
        experts_span_dp=ENGINES[engine].experts_span_dp,
    )  # fmt: skip
    notes += deployment.notes
    _, _, precision = weight_dtypes(model, dtype)
    version = (size.engine_version or "unstated").strip().lower().removeprefix("v")
    is_speculative = (engine, model.name, version) in SPECULATIVE
    if is_speculative:
        notes.append(
            f"measurements of {model.name} on {engine} {version} ran multi-token prediction: it is in the times"
        )
    if size.engine_version is not None and not _names_release(size.engine_version):
        notes.append(
            f"engine version {shorten(size.engine_version, 30)!r} names no release: the default rules of {engine}"
        )
        size = replace(size, engine_version=None)
    kv_dtype = size.kv_cache_dtype
    if not request.kv_dtype_given:
        kv_dtype, why = assumed_kv_dtype(model, gpu, engine, precision, dtype)
        notes += [why] if why else []
    resolved = replace(
        size, model=size.model if note is None else model.name, weight_dtype=dtype, kv_cache_dtype=kv_dtype,
        tp_size=deployment.attention_tp_size, dp_size=deployment.attention_dp_size,
        ep=size.ep or deployment.expert_parallel_size > 1,
        context_tokens=size.max_model_len_tokens or 1,  # each point asks what its own length leaves
    )  # fmt: skip
    setup = _as_one_server(set_up(resolved), deployment)
    plan = cache_plan(setup)
    notes += plan.warnings
    if plan.dcp_size > 1:
        notes.append("what ranks of --dcp exchange of their shares of attention is not in the times")
    traffic = make_traffic(model, plan, deployment, dtype)
    assert setup.gpu is not None
    is_wide, spans = _span(deployment, setup.gpu)
    notes += [spans] if spans else []
    stored = plan.kv_cache_dtype
    heads = latent_heads(model, deployment.attention_tp_size, plan.dcp_size)
    speed = kv_speed(setup.gpu.name, engine, stored, is_latent(model), request.calibration, heads,
                     latent_bytes_ratio(model, traffic.kv[0].bytes_per_state))  # fmt: skip
    notes += calibration_notes(setup.gpu.name, engine, request.calibration, is_latent(model), heads)
    shown = replace(size, model=model.name, gpu=setup.gpu.name, engine=engine, engine_version=plan.version,
                    weight_dtype=stored_format(model, dtype), kv_cache_dtype=stored,
                    block_size_tokens=plan.block_size_tokens)  # fmt: skip
    return Served(
        request=replace(request, size=shown),
        setup=setup,
        plan=plan,
        deployment=deployment,
        traffic=traffic,
        peaks=peaks_of(setup.gpu),
        traits=Traits(
            engine=engine,
            gpu=setup.gpu.name,
            precision=precision,
            family=family_of(model),
            is_moe=traffic.num_experts > 0,
            is_wide=is_wide,
            is_beyond_node=deployment.is_beyond_node and not is_wide,
            is_speculative=is_speculative,
            engine_version=version,
            layout=replace(deployment, num_replicas=1).describe(),
        ),
        kv_speed=speed,
        available_bytes=budget_of(setup, weights_of(setup)).room_bytes,
        max_running=size.max_num_seqs or setup.default_num_seqs,
        notes=tuple(notes),
    )


def _span(deployment: Deployment, gpu: GpuSpec) -> tuple[bool, str | None]:
    """(whether it is wide expert parallelism as it was measured, what to say) of a stage beyond a node."""
    joined, gpus = gpu.link_max_gpus or NVLINK_NODE_GPUS, deployment.tp_group_size
    if gpus > joined:
        beyond = f"{gpus} GPUs a stage are more than the {joined} that a link joins"
        return False, f"{beyond}: the network between nodes is not in the times"
    if not deployment.is_beyond_node or deployment.attention_tp_size > 1:
        return False, None
    measured = "wide expert parallelism was measured of GPUs that only decode, while others prefill"
    return True, f"{measured}; TTFT was up to 8 times as long"


def _names_release(version: str) -> bool:
    """Whether a version starts with a number; ``nightly`` and development builds do not."""
    try:
        parse_version(version, version)
    except InputError:
        return False
    return True


def family_of(model: ModelConfig) -> str:
    """What models of one geometry share whatever they are called: type, layers, width, experts."""
    experts = max((layer.num_experts for layer in model.layers), default=0)
    return f"{model.model_type}-{model.num_layers}x{model.hidden_size}" + (f"-e{experts}" if experts else "")


def _as_one_server(setup: Setup, deployment: Deployment) -> Setup:
    """``setup`` as one replica, whose ranks share the experts on every engine."""
    fraction = setup.memory_fraction
    if setup.request.gpu_memory_utilization is None and deployment.attention_dp_size > 1:
        fraction = setup.engine.default_fraction(setup.model, replace(setup.options, ep=True))
    return replace(setup, engine=replace(setup.engine, experts_span_dp=True), memory_fraction=fraction)
