"""How far engines fill the experts of an MXFP4 checkpoint (gpt-oss) up, for the kernels that multiply by them.

vLLM ``model_executor/layers/quantization/mxfp4.py`` and ``fused_moe/oracle/mxfp4.py``
(``mxfp4_round_up_hidden_size_and_intermediate_size``): TensorRT-LLM's kernels on datacentre Blackwell take multiples of
256 × 128 (0.26 has 256 × 256, 0.29 not), AMD's 256 × 256, Marlin's (Ampere, Ada, small Blackwell) 256 × 128. Triton's
on Hopper split the width by 64 and lay the hidden size out by 256: gpt-oss-120b loads 64.38 GiB
(vllm-project/vllm#33155). SGLang fills up on datacentre Blackwell (``layers/quantization/mxfp4.py``).
"""

from __future__ import annotations

from kvplan.memory.engines.options import EngineOptions
from kvplan.memory.engines.vllm_versions import CURRENT
from kvplan.model_config.types import ModelConfig
from kvplan.weights import UNPADDED, ExpertPadding


def expert_padding(model: ModelConfig, engine: str, options: EngineOptions) -> ExpertPadding:
    """The multiples of this engine and GPU, of which an unknown one is taken for Hopper; none for other checkpoints,
    other engines and without a GPU.
    """
    gpu, quantization = options.gpu, model.quantization
    if gpu is None or quantization is None or quantization.method != "mxfp4" or engine not in ("vllm", "sglang"):
        return UNPADDED
    if engine == "sglang":
        return ExpertPadding(256, 256) if options.is_sm100_family else UNPADDED
    wide = gpu.vendor == "amd" or (options.is_sm100_family and (options.version or CURRENT) < (0, 27))
    return ExpertPadding(256, 256 if wide else 64 if options.sm in (None, 90) else 128)
