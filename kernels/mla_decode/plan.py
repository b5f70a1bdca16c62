"""Host side of latent decode: buffers, configuration and launches for one shape."""

import math

import torch

from ..configs import Config, mla_config
from ..decode_attention.plan import LEVELS
from ..device import KernelFacts, architecture, interpreting, loaded_facts, resident_ctas, unpack_mode
from ..formats import LATENT_DIM, ROPE_DIM, latent_head_blocks
from ..latent_cache import LatentCache
from .kernel import attend_latent

FORMAT_CODES = {"bf16": 0, "fp8_e4m3": 1, "fp8_ds_mla": 2}


class MlaPlan:
    """Latent decode for caches of one shape: `run` launches it on one layer.

    `num_heads` query heads (16 to 128 a rank in practice; above 32 they are split among programs, evenly). ValueError
    for other counts.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        num_heads: int,
        softmax_scale: float,
        config: Config | None = None,
        num_chunks: int | None = None,
    ) -> None:
        self.head_blocks = latent_head_blocks(num_heads)
        self.num_heads = num_heads
        self.batch = cache.block_table.shape[0]
        self.arch = architecture(cache.data.device)
        heads = num_heads // self.head_blocks
        padded = max(16, 1 << (heads - 1).bit_length())
        self.config = config or mla_config(self.arch, 16 if cache.kv_dtype == "bf16" else 8, heads)
        self._scale_log2e = softmax_scale * math.log2(math.e)
        self._flags = {
            "HEAD_BLOCKS": self.head_blocks,
            "HEADS": heads,
            "HP": padded,
            "ROW": cache.data[0, 0].nbytes // 2,
            "PAGE": cache.block_size_tokens,
            "BLOCK_N": self.config.block_n,
            "STAGES": self.config.num_stages,
            "FORMAT": FORMAT_CODES[cache.kv_dtype],
            "BATCH": max(16, 1 << (self.batch - 1).bit_length()),
            "JOIN_STAGES": 2,
            "UNPACK": unpack_mode(self.arch),
            "EXACT_DOT": interpreting(),
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
        self.num_chunks = num_chunks or 1
        self._allocate(cache)
        self.facts: KernelFacts | None = None
        if not interpreting():
            q = torch.empty(
                self.batch, num_heads, LATENT_DIM + ROPE_DIM, dtype=torch.bfloat16, device=cache.data.device
            )
            args = self._arguments(q, cache, q[..., :LATENT_DIM].contiguous())
            self.facts = loaded_facts(attend_latent.warmup(*args, grid=(1,), **self._flags))
        if num_chunks is None:
            resident = resident_ctas(self.facts, self.arch, cache.data.device, self.config.ctas_per_sm)
            self.num_chunks = max(1, resident // self.head_blocks)
            self._allocate(cache)

    def _allocate(self, cache: LatentCache) -> None:
        device = cache.data.device
        rows = self.num_chunks * 2 * self.num_heads
        self._partial = torch.empty(rows, LATENT_DIM, device=device)
        self._partial_lse = torch.empty(rows, device=device)
        self._arrived = torch.zeros(LEVELS * self.num_chunks * 2 * self.head_blocks, dtype=torch.int32, device=device)

    def _arguments(self, q: torch.Tensor, cache: LatentCache, out: torch.Tensor) -> tuple:
        return (
            *(
                q,
                cache.data if cache.kv_dtype == "bf16" else cache.data.view(torch.uint16),
                cache.scale,
                cache.block_table,
                cache.seq_lens,
                out,
            ),
            *(self._partial, self._partial_lse, self._arrived, self._scale_log2e),
            *(self.batch, self.num_chunks, q.stride(0), cache.block_table.stride(0), out.stride(0)),
        )

    def run(self, q: torch.Tensor, cache: LatentCache, out: torch.Tensor | None = None) -> torch.Tensor:
        """Output `[batch, heads, 512]` for absorbed queries `[batch, heads, 576]` (bf16, contiguous); one launch."""
        if q.shape[:2] != (self.batch, self.num_heads) or cache.block_table.shape[0] != self.batch:
            raise ValueError(f"the plan is for {self.batch} sequences of {self.num_heads} query heads")
        if out is None:
            out = torch.empty(*q.shape[:2], LATENT_DIM, dtype=q.dtype, device=q.device)
        attend_latent[(self.num_chunks * self.head_blocks,)](*self._arguments(q, cache, out), **self._flags)
        return out
