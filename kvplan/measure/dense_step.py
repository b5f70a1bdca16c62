"""A whole decode step of a dense model in one graph: real shapes, random weights, kvplan's attention and append.

For each layer: RMS norm, one matrix for q, k and v, rotary embedding, quantise-and-append, attention over the paged
cache, output matrix, RMS norm, gate and up as one matrix, SiLU, down. Then the final norm, the LM head and arg max.
Weights of all layers are disjoint; caches are disjoint over enough layers that none is still in L2 when its turn comes
again. FP8 weights are e4m3 with one scale a matrix; activations become e4m3 with a static scale of 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, rms_norm, silu

from kvplan.kernels.bench.timing import time_calls
from kvplan.kernels.paged_cache import PagedKvCache, random_caches
from kvplan.measure.backend import Timed
from kvplan.measure.family import Family
from kvplan.measure.step_plan import StepModel

ROPE_THETA = 500000.0
E4M3_MAX = 448.0
LARGEST_SIGMA = 8.0
"""Standard deviations of a weight that its FP8 scale reaches."""

Attend = Callable[[torch.Tensor, PagedKvCache], torch.Tensor]
MakeAttend = Callable[[PagedKvCache, int, torch.dtype], Attend]
Append = Callable[[torch.Tensor, torch.Tensor, PagedKvCache, torch.Tensor], None]


class DenseStep:
    """The weights of a model on a device, and steps over caches of any format."""

    def __init__(
        self, model: StepModel, *, device: str, dtype: torch.dtype, make_attend: MakeAttend, append: Append, seed: int
    ) -> None:
        self.model, self.device, self.dtype, self.seed = model, device, dtype, seed
        self.make_attend, self.append = make_attend, append
        generator = torch.Generator(device).manual_seed(seed)

        self.scales: dict[int, torch.Tensor] = {}

        def wide(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, device=device, dtype=dtype).normal_(0, columns**-0.5, generator=generator)

        def weight(rows: int, columns: int) -> torch.Tensor:
            drawn = wide(rows, columns)
            if model.weight_dtype == "bf16":
                return drawn
            scale = LARGEST_SIGMA * columns**-0.5 / E4M3_MAX
            self.scales[columns] = torch.tensor(scale, device=device)
            return (drawn.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

        shape, hidden, inner = model.shape, model.hidden_size, model.intermediate_size
        qkv = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        heads = shape.num_q_heads * shape.head_dim
        self.layers = [
            (weight(qkv, hidden), weight(hidden, heads), weight(2 * inner, hidden), weight(hidden, inner))
            for _ in range(model.num_layers)
        ]
        self.lm_head = wide(model.vocab_size, hidden)
        self.one = torch.tensor(1.0, device=device)
        self.norm = torch.ones(hidden, device=device, dtype=dtype)

    def time(
        self, family: Family, batch: int, context: int, *, layers: int, block_size_tokens: int, replays: int
    ) -> Timed:
        """A step over ``layers`` distinct caches."""
        caches = random_caches(
            [context] * batch, kv_dtype=family.element, scale_granularity=family.scale_granularity, device=self.device,
            block_size_tokens=block_size_tokens, num_kv_heads=family.shape.num_kv_heads,
            head_dim=family.shape.head_dim, num_layers=layers, seed=self.seed,
        )  # fmt: skip
        attend = self.make_attend(caches[0], family.shape.num_q_heads, self.dtype)
        last = context - 1
        pages = caches[0].block_table[:, last // block_size_tokens].long()
        slots = pages * block_size_tokens + last % block_size_tokens
        hidden = torch.randn(batch, self.model.hidden_size, device=self.device).to(self.dtype)
        width = family.shape.head_dim
        angles = last * ROPE_THETA ** -(torch.arange(0, width, 2, device=self.device) / width)
        rope = torch.cat([angles, angles]).cos().to(self.dtype), torch.cat([angles, angles]).sin().to(self.dtype)
        step = [lambda: self._step(hidden, caches, slots, rope, attend)]
        timing = time_calls(step, device=self.device, samples=replays)
        read = self.model.weight_bytes + self.model.num_layers * caches[0].read_bytes()
        return Timed(timing.median_s, timing.p10_s, timing.p90_s, timing.samples, read, timing.sm_clock_hz,
                     caches[0].layout, block_size_tokens)  # fmt: skip

    def _step(
        self, x: torch.Tensor, caches: list[PagedKvCache], slots: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:  # fmt: skip
        shape, size = self.model.shape, (self.model.hidden_size,)
        q_heads, kv_heads = shape.num_q_heads, shape.num_kv_heads
        for number, (qkv_weight, out_weight, gate_up_weight, down_weight) in enumerate(self.layers):
            cache = caches[number % len(caches)]
            qkv = self._product(rms_norm(x, size, self.norm), qkv_weight).view(len(x), -1, shape.head_dim)
            q_and_k = _rotate(qkv[:, : q_heads + kv_heads], *rope)
            self.append(q_and_k[:, q_heads:].contiguous(), qkv[:, q_heads + kv_heads :].contiguous(), cache, slots)
            attended = attend(q_and_k[:, :q_heads].contiguous(), cache)
            x = x + self._product(attended.reshape(len(x), -1).to(self.dtype), out_weight)
            gate, up = self._product(rms_norm(x, size, self.norm), gate_up_weight).chunk(2, dim=-1)
            x = x + self._product(silu(gate) * up, down_weight)
        return linear(rms_norm(x, size, self.norm), self.lm_head).argmax(-1)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """X times a weight's transpose; in FP8 with FP32 sums where the weight is."""
        if weight.dtype != torch.float8_e4m3fn:
            return linear(x, weight)
        scale = self.scales[weight.shape[1]]
        product: torch.Tensor = torch._scaled_mm(
            x.to(weight.dtype), weight.t(), scale_a=self.one, scale_b=scale, out_dtype=self.dtype
        )
        return product


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
