"""How to start each engine with the plan. Only options that the engine's own command line has.

vLLM: ``vllm serve --help`` (vllm/engine/arg_utils.py). SGLang: sglang/srt/server_args.py, since 0.5.20 arg_groups/
(read in 0.5.5 to 0.5.23).
TensorRT-LLM: tensorrt_llm/commands/serve.py (read in 1.2 development; for DeepSeek-V4 its example); the KV dtype is not
an option there but a field of the YAML file that ``--config`` names.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace

from kvplan import profiles
from kvplan.document.parts import Launch
from kvplan.dtypes import AUTO, kv_format
from kvplan.errors import KvplanError
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.engines import ENGINES
from kvplan.memory.engines.sglang import page_tokens
from kvplan.memory.engines.sglang_memory import default_batched_tokens, rules_version
from kvplan.memory.engines.tensorrt_llm import COMPRESSED_BLOCK_TOKENS, COMPRESSED_SINCE, elsewhere
from kvplan.memory.engines.vllm_versions import CURRENT, VersionRules
from kvplan.memory.setup import Setup
from kvplan.memory.splits import redundant_experts, split_refusal

SGLANG_KV = {"float16": "auto", "bfloat16": "bfloat16", "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3",
             "fp8_e5m2": "fp8_e5m2", "fp8_ds_mla": "fp8_e4m3", "nvfp4": "nvfp4"}  # fmt: skip
TRTLLM_KV = {"bfloat16": "auto", "float16": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "nvfp4": "nvfp4"}
"""KV formats by our name → what the engine's ``--kv-cache-dtype`` or ``kv_cache_config.dtype`` calls them."""

TRTLLM_CONFIG = "kvplan-trtllm.yaml"
SGLANG_DCP_SINCE = SGLANG_NVFP4_SINCE = (0, 5, 16)
SGLANG_ATTN_DP_SINCE = (0, 5, 22)
"""Versions with ``--dcp-size`` and ``--kv-cache-dtype nvfp4`` (0.5.14 has neither), and with ``--attn-dp-size``, which
replaces ``--enable-dp-attention``."""

LEAST_FRACTION = 0.01
"""SGLang's fraction below which what it sets aside is the whole GPU."""

SOURCES = {
    "vllm": "vllm serve --help; vllm/engine/arg_utils.py",
    "sglang": "sglang/srt/server_args.py",
    "tensorrt-llm": "tensorrt_llm/commands/serve.py",
}


def launches_of(setup: Setup, cache: CachePlan, *, fits: bool) -> list[Launch]:
    """A command for each engine, the planned one first; a note says so when the plan does not fit."""
    asked_for_users = fits and setup.request.batch_size is not None
    users = setup.batch_per_replica if asked_for_users else None
    makers = {"vllm": _vllm, "sglang": _sglang, "tensorrt-llm": _tensorrt_llm}
    planned = setup.engine.name
    names = sorted(makers, key=lambda name: name != planned)
    found = []
    for name in names:
        version = setup.options.version if name == planned else None
        refusal = split_refusal(setup.model, name, setup.split, setup.request.weight_dtype, version)
        command, notes = makers[name](setup, cache.kv_cache_dtype, users)
        if refusal is not None:
            command, notes = None, [f"no launch line: {refusal}"]
        if setup.request.weight_dtype is not None and command is not None:
            notes.append(f"the plan takes weights stored as {setup.request.weight_dtype}: serve such a checkpoint")
        if name != planned:
            notes.append("planned for another engine: this one manages memory by its own rules, so capacity differs")
        elif not fits:
            notes.append("this plan does not fit: see the answer for what would")
        shown = cache.version if name == planned else ENGINES[name].version
        found.append(Launch(engine=name, version=shown, command=command, notes=notes, source=SOURCES[name]))
    return found


def model_reference(setup: Setup) -> str:
    """What an engine would call the model: its hub id when a bundled profile knows it, else as it was asked for."""
    asked = setup.request.model or ""
    name = profiles.find("models", asked)
    ids = profiles.load("models", name).get("hf_ids", []) if name is not None and "/" not in asked else []
    return str(ids[0]) if ids else asked


def _command(words: Iterable[str], options: Iterable[tuple[str, object]]) -> str:
    """One line: options whose value is None are left out, those whose value is True stand alone."""
    parts = [shlex.quote(word) for word in words]
    for flag, value in options:
        if value is True:
            parts.append(flag)
        elif value is not None:
            parts.append(f"{flag} {shlex.quote(str(value))}")
    return " ".join(parts)


def _above_one(count: int) -> int | None:
    return count if count > 1 else None


def _attention_dp(setup: Setup) -> int:
    """Data-parallel ranks that one server spans because they share the experts; 1 where each is a replica."""
    return setup.request.dp_size if setup.shares_experts else 1


def _fraction(setup: Setup, engine: str) -> float:
    """The planned fraction on the planned engine, elsewhere the other engine's default for what its line says."""
    if setup.engine.name == engine:
        return setup.fraction
    options = replace(setup.options, version=None, ep=_attention_dp(setup) > 1 or setup.split.ep)
    return ENGINES[engine].default_fraction(setup.model, options).value


def _is_auto(setup: Setup, engine: str, kv_dtype: str) -> bool:
    """Whether ``kv_dtype`` has 16 bits and ``auto`` is it: checkpoints ask for others, and kernels of some GPUs."""
    if kv_format(kv_dtype).key_bits != 16:
        return False
    version = setup.options.version if setup.engine.name == engine else None
    options = replace(setup.options, kv_cache_dtype=AUTO, block_size_tokens=None, version=version)
    try:
        return ENGINES[engine].plan_cache(setup.model, options).kv_cache_dtype == kv_dtype
    except KvplanError:
        return False


def _vllm(setup: Setup, kv_dtype: str, users: int | None) -> tuple[str | None, list[str]]:
    request, mine = setup.request, setup.engine.name == "vllm"
    given = request.kv_cache_memory_bytes if mine else None
    fraction = _fraction(setup, "vllm")
    if ":" in kv_dtype:
        return None, [f"vLLM has no KV format {kv_dtype}"]
    defaults = VersionRules((setup.options.version or CURRENT) if mine else CURRENT)
    limit, tokens = request.max_num_seqs, request.max_num_batched_tokens
    if limit is None and users is not None and users > defaults.default_num_seqs(setup.gpu):
        limit = users
    if limit is not None and limit > (tokens or defaults.default_batched_tokens(setup.gpu)):
        tokens = limit  # it refuses more requests than tokens of a step
    options = [
        ("--tensor-parallel-size", _above_one(request.tp_size)),
        ("--pipeline-parallel-size", _above_one(request.pp_size)),
        ("--data-parallel-size", _above_one(request.dp_size)),
        ("--decode-context-parallel-size", _above_one(request.dcp_size)),
        ("--enable-expert-parallel", True if setup.split.ep else None),
        ("--max-model-len", setup.max_model_len_tokens),
        ("--max-num-seqs", limit),
        ("--max-num-batched-tokens", tokens),
        ("--kv-cache-dtype", AUTO if _is_auto(setup, "vllm", kv_dtype) else kv_dtype),
        ("--block-size", request.block_size_tokens),
        ("--no-enable-prefix-caching", None if request.enable_prefix_caching else True),
        ("--gpu-memory-utilization", f"{fraction:g}" if given is None else None),
        ("--kv-cache-memory-bytes", given),
    ]
    notes = []
    if users is not None and limit is None:
        notes.append(f"add --max-num-seqs {users} to make the planned number of users a limit")
    return _command(["vllm", "serve", model_reference(setup)], options), notes


def _sglang(setup: Setup, kv_dtype: str, users: int | None) -> tuple[str | None, list[str]]:
    request, mine = setup.request, setup.engine.name == "sglang"
    version = rules_version(setup.options.version if mine else None)
    if kv_dtype not in SGLANG_KV or (kv_dtype == "nvfp4" and version < SGLANG_NVFP4_SINCE):
        return None, [f"SGLang has no KV format {kv_dtype}; it takes {', '.join(dict.fromkeys(SGLANG_KV.values()))}"]
    if request.dcp_size > 1 and version < SGLANG_DCP_SINCE:
        return None, ["no launch line: SGLang splits contexts among GPUs (--dcp-size) since 0.5.16"]
    fraction, chunk = _fraction(setup, "sglang"), request.max_num_batched_tokens
    if fraction < LEAST_FRACTION and chunk is not None and not mine:
        return None, [f"no launch line: a chunked prefill of {chunk:,} tokens leaves SGLang no memory on this GPU"]
    ranks, limit = _attention_dp(setup), request.max_num_seqs or users
    copies = redundant_experts(setup.model, setup.split)
    renamed = version >= SGLANG_ATTN_DP_SINCE and ranks > 1
    options = [
        ("--tp-size", _above_one(request.tp_size * ranks)),
        ("--pp-size", _above_one(request.pp_size)),
        ("--attn-dp-size" if renamed else "--dp-size", _above_one(request.dp_size)),
        ("--enable-dp-attention", True if ranks > 1 and not renamed else None),
        ("--dcp-size", _above_one(request.dcp_size)),
        ("--ep-size", setup.split.expert_ranks if setup.split.ep else None),
        ("--ep-num-redundant-experts", copies or None),
        ("--context-length", setup.max_model_len_tokens),
        ("--max-running-requests", limit and limit * ranks),  # ranks of attention share both, replicas have them each
        ("--kv-cache-dtype", AUTO if _is_auto(setup, "sglang", kv_dtype) else SGLANG_KV[kv_dtype]),
        ("--page-size", request.block_size_tokens),
        ("--chunked-prefill-size", _whole_chunk(setup, version, ranks)),
        ("--swa-full-tokens-ratio", request.swa_full_tokens_ratio),
        ("--mamba-full-memory-ratio", request.mamba_full_memory_ratio),
        ("--disable-radix-cache", None if request.enable_prefix_caching else True),
        ("--mem-fraction-static", f"{fraction:g}"),
    ]
    notes = []
    if copies:
        notes.append(_copies_note(setup, copies))
    if request.dcp_size > 1:
        notes.append("which attention kernels take --dcp-size was not read")
    return _command(["python", "-m", "sglang.launch_server", "--model-path", model_reference(setup)], options), notes


def _whole_chunk(setup: Setup, version: tuple[int, ...], ranks: int) -> int | None:
    """``--chunked-prefill-size``, of which each rank's share must be whole pages; None where the default is."""
    stated = setup.request.max_num_batched_tokens
    each = stated or default_batched_tokens(setup.gpu, version, ranks)
    page = setup.request.block_size_tokens or page_tokens(setup.model, setup.options)
    if stated is None and each % page == 0:
        return None
    return max(each // page, 1) * page * ranks


def _copies_note(setup: Setup, copies: int) -> str:
    return f"its experts do not divide by {setup.split.expert_ranks} ranks: {copies} redundant ones fill them up"


def _tensorrt_llm(setup: Setup, kv_dtype: str, users: int | None) -> tuple[str | None, list[str]]:
    request = setup.request
    reason = elsewhere(setup.model, setup.gpu)
    if reason is not None:
        return None, [f"no launch line: {reason}"]
    compressed = "compressed" in setup.model.cache_kinds
    kv_dtype = "fp8" if compressed and kv_dtype == "fp8_ds_mla" else kv_dtype
    if kv_dtype not in TRTLLM_KV:
        return None, [f"TensorRT-LLM has no KV format {kv_dtype}; it takes auto, fp8 and nvfp4"]
    ranks = _attention_dp(setup)
    if request.dcp_size > 1 or request.dp_size > ranks:
        return None, ["one trtllm-serve runs one replica; start one for each, without context parallelism"]
    is_auto = _is_auto(setup, "tensorrt-llm", kv_dtype)
    if TRTLLM_KV[kv_dtype] == AUTO and not is_auto:
        return None, [f"no launch line: TensorRT-LLM takes the KV format that the checkpoint asks for, not {kv_dtype}"]
    copies, held = redundant_experts(setup.model, setup.split), []
    if ranks > 1:
        held.append("enable_attention_dp: true")
    if not is_auto or held:
        dtype = AUTO if is_auto else TRTLLM_KV[kv_dtype]
        block = f", tokens_per_block: {COMPRESSED_BLOCK_TOKENS}" if compressed else ""
        held.append(f"kv_cache_config: {{dtype: {dtype}{block}}}")
    notes = []
    if compressed:
        notes.append(
            f"DeepSeek-V4 needs a release candidate, {COMPRESSED_SINCE} or later; its guide starts with 0.5 of the "
            "free memory, and leaves --custom_tokenizer out for base checkpoints"
        )
    if copies:
        slots = max(layer.num_experts for layer in setup.model.layers) + copies
        held.append(f"moe_config: {{load_balancer: {{num_slots: {slots}}}}}")
        notes.append(_copies_note(setup, copies))
    if held:
        notes.insert(0, f"{TRTLLM_CONFIG} holds: {{{', '.join(held)}}}")
    options = [
        ("--tp_size", _above_one(request.tp_size * ranks)),
        ("--pp_size", _above_one(request.pp_size)),
        ("--ep_size", setup.split.expert_ranks if setup.split.ep else None),
        ("--max_seq_len", setup.max_model_len_tokens),
        ("--max_batch_size", users if request.max_num_seqs is None else request.max_num_seqs),
        ("--free_gpu_memory_fraction", f"{_fraction(setup, 'tensorrt-llm'):g}"),
        ("--custom_tokenizer", "deepseek_v4" if compressed else None),
        ("--config", TRTLLM_CONFIG if held else None),
    ]
    return _command(["trtllm-serve", model_reference(setup)], options), notes
