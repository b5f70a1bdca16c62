"""One layer's paged KV cache as the kernels read it, and ways to fill one.

`k` and `v` are stored as engines store them: HND `[pages, kv_heads, slots, row]` or NHD `[pages, slots, kv_heads,
row]`, where a row is `head_dim` elements (bytes for the 8-bit formats), plus, inline, a 16-byte slot that begins with
the row's FP32 scale. Separate per-token-head scales are FP32 `[pages, kv_heads, slots]`.
"""

from dataclasses import dataclass, replace

import torch

from .formats import SCALE_BLOCK_DIMS, KvFormat, check_cache_shape, kv_format, row_bytes
from .reference.quantise import quantise, quantise_blocks


@dataclass(frozen=True)
class PagedKvCache:
    """K and V of one layer, the block table and the lengths. `block_table` int32 `[batch, pages]`, `seq_lens` int32.

    4-bit formats: block scales `[pages, kv_heads, slots, blocks]`, FP16 or e4m3 codes, and FP32 `global_scales` `[2]`.
    """

    fmt: KvFormat
    scale_granularity: str
    layout: str
    block_size_tokens: int
    num_kv_heads: int
    head_dim: int
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    global_scales: torch.Tensor | None = None

    def by_page_slot_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stored `k` or `v` seen as `[pages, slots, kv_heads, row]`."""
        return tensor.transpose(1, 2) if self.layout == "HND" else tensor

    def row_scales(self, which: str) -> torch.Tensor | None:
        """Per-token-head scales of "k" or "v" as FP32 `[pages, slots, kv_heads]`; None for coarser granularities."""
        if self.scale_granularity == "token_head":
            return (self.k_scale if which == "k" else self.v_scale).transpose(1, 2)
        if self.scale_granularity == "token_head_inline":
            rows = self.by_page_slot_head(self.k if which == "k" else self.v)
            return rows.view(torch.float32)[..., self.head_dim // 4]
        return None

    def read_bytes(self, window_tokens: int | None = None) -> int:
        """Bytes of K, V and per-token scales that one decode step has to read (int; synchronises)."""
        lengths = self.seq_lens.long()
        if window_tokens is not None:
            lengths = lengths.clamp(max=window_tokens)
        row, scale = row_bytes(self.fmt, self.head_dim, self.scale_granularity)
        return int(lengths.sum()) * self.num_kv_heads * 2 * (row + scale)


def block_table(seq_lens: list[int], block_size_tokens: int, device: str, seed: int = 0) -> torch.Tensor:
    """Random pages for the given lengths: int32 `[batch, max pages]`, every page used once; unused entries are 0."""
    counts = [-(-n // block_size_tokens) for n in seq_lens]
    pages = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, chosen in enumerate(pages.split(counts)):
        table[row, : len(chosen)] = chosen
    return table.to(device)


def _empty_pair(
    fmt: KvFormat, granularity: str, layout: str, num_pages: int, slots: int, heads: int, dim: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V; a page of K lies beside its page of V, as FlashInfer's and TensorRT-LLM's pools have them."""
    if fmt.element_bits == 16:
        row, dtype = dim, getattr(torch, fmt.torch_dtype)
    else:
        row, dtype = row_bytes(fmt, dim, granularity)[0], torch.uint8
    inner = (heads, slots) if layout == "HND" else (slots, heads)
    return torch.empty(num_pages, 2, *inner, row, dtype=dtype, device=device).unbind(1)


def _fill_random(data: torch.Tensor, fmt: KvFormat, generator: torch.Generator) -> None:
    """Normal values as codes of `fmt`, spread over the format's range; in slices, to spare memory."""
    spread = {"fp8_e4m3": 64.0, "fp8_e5m2": 64.0, "int8": 32.0}.get(fmt.name, 1.0)
    for part in data.split(max(1, len(data) // 16)):
        x = torch.randn(part.shape, device=part.device, generator=generator)
        if fmt.element_bits == 16:
            part.copy_(x)
        elif fmt.element_bits == 4:
            other = torch.randn(part.shape, device=part.device, generator=generator)
            low, high = ((v * 2.5 + 8).round_().clamp_(1, 15).to(torch.uint8) for v in (x, other))
            part.copy_(low | (high << 4))
        elif fmt.name == "int8":
            part.copy_((x * spread).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8))
        else:
            part.copy_(
                (x * spread).clamp_(-fmt.max_value, fmt.max_value).to(getattr(torch, fmt.torch_dtype)).view(torch.uint8)
            )


def random_caches(
    seq_lens: list[int],
    *,
    kv_dtype: str,
    scale_granularity: str = "none",
    layout: str = "HND",
    block_size_tokens: int = 64,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    num_layers: int = 1,
    device: str = "cuda",
    seed: int = 0,
) -> list[PagedKvCache]:
    """`num_layers` caches with disjoint pages of random finite codes, one block table. For timing and for gates."""
    fmt = kv_format(kv_dtype)
    check_cache_shape(fmt, scale_granularity, layout, block_size_tokens, head_dim)
    generator = torch.Generator(device).manual_seed(seed)
    table = block_table(seq_lens, block_size_tokens, device, seed)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    pages = sum(-(-n // block_size_tokens) for n in seq_lens)
    unit = {"fp8_e4m3": 1 / 64, "fp8_e5m2": 1 / 64, "int8": 1 / 32}.get(fmt.name, 1.0)
    caches = []
    for _ in range(num_layers):
        data, scales = [], []
        for x in _empty_pair(fmt, scale_granularity, layout, pages, block_size_tokens, num_kv_heads, head_dim, device):
            _fill_random(x, fmt, generator)
            shape = {"token_head": (pages, num_kv_heads, block_size_tokens), "token_head_inline": x.shape[:-1]}.get(
                scale_granularity, (num_kv_heads,)
            )
            scale = torch.rand(shape, device=device, generator=generator).add_(0.5).mul_(unit)
            if scale_granularity == "token_head_inline":
                x.view(torch.float32)[..., head_dim // 4] = scale
                scale = scale.new_empty(0)
            elif scale_granularity in ("none", "tensor"):
                scale.fill_(1.0 if scale_granularity == "none" else unit)
            if scale_granularity == "block":
                scale = _random_block_scales(fmt, (pages, num_kv_heads, block_size_tokens), head_dim, generator, device)
            data.append(x)
            scales.append(scale)
        caches.append(
            PagedKvCache(
                fmt,
                scale_granularity,
                layout,
                block_size_tokens,
                num_kv_heads,
                head_dim,
                *data,
                *scales,
                table,
                lengths,
                torch.tensor([0.7, 1.3], device=device) if fmt.element_bits == 4 else None,
            )
        )
    return caches


def _random_block_scales(
    fmt: KvFormat, shape: tuple[int, ...], head_dim: int, generator: torch.Generator, device: str
) -> torch.Tensor:
    """Block scales between 1/8 and 1/2, as stored."""
    blocks = head_dim // SCALE_BLOCK_DIMS[fmt.name]
    scale = torch.rand((*shape, blocks), device=device, generator=generator) * 0.375 + 0.125
    return scale.half() if fmt.name == "int4" else scale.to(torch.float8_e4m3fn).view(torch.uint8)


def cache_from_dense(
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    *,
    kv_dtype: str,
    scale_granularity: str = "none",
    layout: str = "HND",
    block_size_tokens: int = 16,
    seed: int = 0,
    spare: float | None = None,
) -> PagedKvCache:
    """Quantise each sequence's K and V (`[tokens, kv_heads, head_dim]`, float) into a paged cache.

    `spare` fills what no token uses (the ends of last pages, one unused page): NaN shows reads past the end.
    """
    fmt = kv_format(kv_dtype)
    heads, dim = k[0].shape[1:]
    check_cache_shape(fmt, scale_granularity, layout, block_size_tokens, dim)
    lengths = [len(x) for x in k]
    device = str(k[0].device)
    table = block_table(lengths, block_size_tokens, device, seed)
    pages = int(sum(-(-n // block_size_tokens) for n in lengths)) + 1
    cache = PagedKvCache(
        fmt,
        scale_granularity,
        layout,
        block_size_tokens,
        heads,
        dim,
        *_empty_pair(fmt, scale_granularity, layout, pages, block_size_tokens, heads, dim, device),
        *(torch.zeros(0, device=device) for _ in "kv"),
        table,
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )
    tokens = torch.cat([torch.arange(n) for n in lengths]).to(device)
    rows = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    page, slot = table[rows, tokens // block_size_tokens].long(), tokens % block_size_tokens
    if scale_granularity == "block":
        return _with_blocks(cache, (torch.cat(k), torch.cat(v)), page, slot)
    done = {}
    for which, dense in (("k", k), ("v", v)):
        codes, scale = quantise(torch.cat(dense), fmt, scale_granularity)
        stored = cache.by_page_slot_head(getattr(cache, which))
        per_row = torch.full((pages, heads, block_size_tokens), float("nan"), device=device)
        if spare is not None:
            filler = torch.full((1,), spare, device=device).to(getattr(torch, fmt.torch_dtype))
            stored[..., :dim] = filler if fmt.element_bits == 16 else filler.view(torch.uint8)
        stored[page, slot, :, :dim] = codes if fmt.element_bits == 16 else codes.view(torch.uint8)
        if scale_granularity.startswith("token_head"):
            per_row[page, :, slot] = scale
            if scale_granularity == "token_head_inline":
                stored.view(torch.float32)[..., dim // 4] = per_row.transpose(1, 2)
            done[which + "_scale"] = per_row
        else:
            done[which + "_scale"] = scale.expand(heads).contiguous()
    return replace(cache, **done)


def _with_blocks(
    cache: PagedKvCache, dense: tuple[torch.Tensor, torch.Tensor], page: torch.Tensor, slot: torch.Tensor
) -> PagedKvCache:
    """`cache` (4-bit) with `dense` K and V at (page, slot); scales that no token uses are NaN."""
    done, global_scales = {}, []
    for which, x in zip("kv", dense, strict=True):
        packed, scales, one = quantise_blocks(x, cache.fmt)
        stored = cache.by_page_slot_head(getattr(cache, which))
        stored.fill_(0xFF)
        stored[page, slot] = packed
        shape = (len(stored), cache.num_kv_heads, cache.block_size_tokens, scales.shape[-1])
        nan = 0x7F if scales.dtype == torch.uint8 else float("nan")
        by_row = torch.full(shape, nan, dtype=scales.dtype, device=x.device)
        by_row[page, :, slot] = scales
        done[which + "_scale"] = by_row
        global_scales.append(one)
    return replace(cache, **done, global_scales=torch.cat(global_scales))
