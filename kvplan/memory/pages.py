"""Pages, groups and pools: the arithmetic by which a paged engine turns bytes into blocks.

A *page* is one layer's share of a block; a *group* is the layers that share a block table; the *pool* is the bytes one
block takes over the widest group. Which pages a model needs is an engine's rule set; this module only counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvplan.parallelism import pipeline_bounds
from kvplan.units import ceil_div, round_up

PageKind = Literal["full", "mla", "indexer", "sliding", "chunked", "state", "sliding_mla"]

UNIFORM_BASE: dict[str, str] = {"full": "full", "mla": "full", "indexer": "full"}
"""Kinds that need the same number of token slots, and so may share a group whatever their page sizes."""


@dataclass(frozen=True, slots=True)
class Page:
    """One layer's share of one block, on one rank.

    Attributes:
        kind: how many blocks a request needs of it.
        block_size_tokens: tokens one block covers.
        num_heads: head slots stored on this rank.
        payload_bytes, scale_bytes: bytes per (head slot, stored state), elements and scales apart.
        tokens_per_state: tokens one stored state stands for (compressed attention).
        window_tokens: sliding window, or chunk of chunked attention.
        state_bytes: the whole page of a constant state; 0 otherwise.
        blocks_per_request: blocks of a constant state one request holds.
        padded_bytes: physical page when the engine pads it.
        num_copies: TP ranks that hold the same content (replicated heads and latents).
        tag: what else tells specs apart (dtype, head sizes); equal pages with different tags do not merge.

    """

    kind: PageKind
    block_size_tokens: int
    num_heads: int = 1
    payload_bytes: int = 0
    scale_bytes: int = 0
    tokens_per_state: int = 1
    window_tokens: int | None = None
    state_bytes: int = 0
    blocks_per_request: int = 0
    padded_bytes: int | None = None
    tag: str = ""
    even: bool = False
    num_copies: int = 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of one (head slot, state), scales included."""
        total = self.payload_bytes + self.scale_bytes
        return total + total % 2 if self.even else total

    @property
    def num_states(self) -> int:
        """Stored states a block holds."""
        return self.block_size_tokens // self.tokens_per_state

    @property
    def content_bytes(self) -> int:
        """Bytes the page needs before padding."""
        if self.state_bytes:
            return self.state_bytes
        return self.num_heads * self.num_states * self.slot_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes the page takes."""
        return self.content_bytes if self.padded_bytes is None else self.padded_bytes

    @property
    def padding_bytes(self) -> int:
        """Bytes of the page that hold nothing."""
        return self.page_bytes - self.content_bytes

    @property
    def scale_bytes_per_page(self) -> int:
        """Bytes of the page that are scales and zero points."""
        return 0 if self.state_bytes else self.num_heads * self.num_states * self.scale_bytes

    def blocks(self, context_tokens: int, tokens_in_flight: int, dcp_size: int = 1) -> int:
        """Blocks a request of ``context_tokens`` may hold at once (vLLM ``v1/kv_cache_interface.py``).

        full and latent ⌈⌈len/dcp⌉/block⌉ · sliding ⌈min(W−1+F, len)/block⌉+1 · chunked ⌈min(chunk+F, len)/block⌉ ·
        constant state: fixed. F is ``tokens_in_flight``.
        """
        block = self.block_size_tokens
        if self.kind == "state":
            return self.blocks_per_request
        if self.kind in ("sliding", "sliding_mla"):
            assert self.window_tokens is not None
            return ceil_div(min(self.window_tokens - 1 + tokens_in_flight, context_tokens), block) + 1
        if self.kind == "chunked":
            assert self.window_tokens is not None
            return ceil_div(min(self.window_tokens + tokens_in_flight, context_tokens), block)
        return ceil_div(ceil_div(context_tokens, dcp_size), block)

    def blocks_formula(self, context_tokens: int, tokens_in_flight: int, dcp_size: int = 1) -> str:
        """``blocks`` with its numbers in it."""
        block, context = f"{self.block_size_tokens:,}", f"{context_tokens:,}"
        if self.kind == "state":
            formula = "states and checkpoints of one request"
        elif self.window_tokens is not None:
            reach = f"{self.window_tokens:,} + {tokens_in_flight:,} in flight"
            if self.kind == "chunked":
                formula = f"⌈min({reach}, {context}) / {block}⌉"
            else:
                formula = f"⌈min({reach} − 1, {context}) / {block}⌉ + 1"
        else:
            formula = f"⌈{context} / {block}⌉" if dcp_size == 1 else f"⌈⌈{context} / {dcp_size}⌉ / {block}⌉"
        return f"{formula} = {self.blocks(context_tokens, tokens_in_flight, dcp_size):,}"

    def live_bytes(self, context_tokens: int, dcp_size: int = 1) -> tuple[int, int]:
        """(payload, scale) bytes a request of ``context_tokens`` needs here, rounding and reserves left out."""
        if self.kind == "state":
            return self.state_bytes, 0
        tokens = ceil_div(context_tokens, dcp_size)
        if self.window_tokens is not None:
            tokens = min(tokens, self.window_tokens)
        states = ceil_div(tokens, self.tokens_per_state)
        payload = self.slot_bytes - self.scale_bytes
        return self.num_heads * states * payload, self.num_heads * states * self.scale_bytes

    def padded_to_multiple(self, alignment: int) -> Page:
        """The same page padded up to a multiple of ``alignment`` bytes."""
        size = round_up(self.content_bytes, alignment)
        return self if size == self.content_bytes else replace(self, padded_bytes=size)


@dataclass(frozen=True, slots=True)
class PageRun:
    """``num_layers`` layers with the same page inside a group."""

    page: Page
    num_layers: int


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table, and the model layers they belong to."""

    runs: tuple[PageRun, ...]
    layers: tuple[int, ...]
    pages: tuple[Page, ...]

    @property
    def num_layers(self) -> int:
        """Cache-holding layers in the group."""
        return len(self.pages)

    @property
    def bytes_per_block(self) -> int:
        """Pages of all its layers."""
        return sum(run.page.page_bytes * run.num_layers for run in self.runs)

    @property
    def block_size_tokens(self) -> int:
        """Tokens a block of this group covers."""
        return self.pages[0].block_size_tokens

    def blocks(self, context_tokens: int, tokens_in_flight: int, dcp_size: int = 1) -> int:
        """Blocks one request may hold of this group."""
        return max(run.page.blocks(context_tokens, tokens_in_flight, dcp_size) for run in self.runs)


def make_group(members: list[tuple[int, Page]]) -> Group:
    """A group of (layer index, page) pairs."""
    counts: dict[Page, int] = {}
    for _, page in members:
        counts[page] = counts.get(page, 0) + 1
    return Group(
        tuple(PageRun(page, count) for page, count in counts.items()),
        tuple(index for index, _ in members),
        tuple(page for _, page in members),
    )


def rank_groups(groups: tuple[Group, ...], num_layers: int, pp_size: int) -> tuple[tuple[Group, ...], ...]:
    """Each pipeline rank's share of every group."""
    if pp_size == 1:
        return (groups,)
    ranks = []
    for low, high in pipeline_bounds(num_layers, pp_size):
        mine: list[Group] = []
        for group in groups:
            members = [(i, p) for i, p in zip(group.layers, group.pages, strict=True) if low <= i < high]
            mine.append(make_group(members) if members else Group((), (), ()))
        ranks.append(tuple(mine))
    return tuple(ranks)
