"""What an engine makes of a model's cache on given ranks: groups, pool, blocks. Every rule set returns one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from kvplan.memory.pages import Group

NOISE = 1e-6
"""Of a byte: what shares that are no binary fractions may add to one."""


@dataclass(frozen=True)
class Pool:
    """A part of the KV memory, set aside at start-up, that only some groups use.

    Attributes:
        name: what it holds.
        share: of the KV bytes.
        groups: indices of the groups in it.
        padding_blocks: blocks of it that no request can use.
        fixed_bytes: its size where that is not a share of the memory; ``share`` is then what it comes to.

    """

    name: str
    share: float
    groups: tuple[int, ...]
    padding_blocks: int = 0
    fixed_bytes: int = 0


@dataclass(frozen=True)
class CachePlan:
    """A model's cache under one engine, precision and parallelism.

    Attributes:
        engine, version: the rule set.
        exact: whether the rules reproduce the engine's own allocator, or approximate it.
        kv_cache_dtype: the format after ``auto`` was resolved.
        block_size_tokens: the block after the engine's overrides.
        groups: of the whole model, in the engine's order.
        rank_groups: the same groups with each pipeline rank's layers only; one entry without PP.
        unified_pool: groups claim blocks from one pool of ``pool_bytes_per_block``; else each group has its own bytes.
        pools: fixed parts of the memory, the one whose tokens the engine logs first; empty where groups share it all.
        reserved_blocks: blocks no request can use (vLLM's null block).
        tokens_in_flight: F, tokens scheduled and not settled.
        rules: (what, formula with numbers, engine file) for ``--explain``.
        warnings: what the engine does silently.
        doubt: why it is not known whether the engine runs the format on this GPU; None where it is.

    """

    engine: str
    version: str
    exact: bool
    kv_cache_dtype: str
    block_size_tokens: int
    groups: tuple[Group, ...]
    rank_groups: tuple[tuple[Group, ...], ...]
    unified_pool: bool = True
    pools: tuple[Pool, ...] = ()
    reserved_blocks: int = 0
    tokens_in_flight: int = 0
    dcp_size: int = 1
    legacy_tokens: bool = False
    packed_multiple_bytes: int = 1
    rules: tuple[tuple[str, str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    doubt: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def num_copies(self) -> int:
        """How many ranks store the same heads or latents, of the layers of which the fewest do."""
        runs = (run for group in self.groups for run in group.runs if run.page.kind != "state")
        return min((run.page.num_copies for run in runs), default=1) // self.dcp_size

    @cached_property
    def pool_bytes_per_block(self) -> int:
        """Bytes one block takes on the rank with the most: its widest group, or all groups when pools are apart."""
        return max((self._rank_pool(groups) for groups in self.rank_groups), default=0)

    def _rank_pool(self, groups: tuple[Group, ...]) -> int:
        sizes = [group.bytes_per_block for group in groups]
        if self.pools:
            logged = self.pools[0]
            return ceil(sum(sizes[index] for index in logged.groups) / logged.share - NOISE)
        return max(sizes, default=0) if self.unified_pool else sum(sizes)

    def num_blocks(self, available_bytes: int) -> int:
        """``available // pool``, the smallest over ranks, the null block among them (vLLM ``kv_cache_planning.py``).

        With fixed pools, those of the one that is logged.
        """
        if self.pools:
            return self.pool_blocks(self.pools[0], available_bytes)
        pool = self.pool_bytes_per_block
        return max(available_bytes, 0) // pool if pool else 0

    def blocks_per_request(self, context_tokens: int) -> int:
        """Blocks one request of ``context_tokens`` may hold, over all groups."""
        return sum(group.blocks(context_tokens, self.tokens_in_flight, self.dcp_size) for group in self.groups)

    def bytes_per_request(self, context_tokens: int) -> int:
        """Bytes one request may hold on the fullest rank; with fixed pools, those it keeps by its tightest one."""
        return max(self.rank_bytes_per_request(rank, context_tokens) for rank in range(len(self.rank_groups)))

    def rank_bytes_per_request(self, rank: int, context_tokens: int) -> int:
        """The same on one pipeline rank."""
        groups = self.rank_groups[rank]
        if self.unified_pool:
            return self.blocks_per_request(context_tokens) * self._rank_pool(groups)
        sizes = self._group_bytes(groups, context_tokens)
        return max((ceil(sum(sizes[i] for i in pool.groups) / pool.share) for pool in self.pools), default=sum(sizes))

    def held_bytes(self, context_tokens: int) -> int:
        """Bytes of the blocks one request holds on the fullest rank, whatever else its pools set aside."""
        if self.unified_pool:
            return self.bytes_per_request(context_tokens)
        return max(sum(self._group_bytes(groups, context_tokens)) for groups in self.rank_groups)

    def pool_needs(self, context_tokens: int) -> dict[str, int]:
        """Bytes one request needs of each pool, by name, on the rank where it holds most."""
        fullest = max((self._group_bytes(groups, context_tokens) for groups in self.rank_groups), key=sum)
        return {pool.name: sum(fullest[index] for index in pool.groups) for pool in self.pools}

    def _group_bytes(self, groups: tuple[Group, ...], context_tokens: int) -> list[int]:
        return [
            group.blocks(context_tokens, self.tokens_in_flight, self.dcp_size) * group.bytes_per_block
            if group.num_layers else 0
            for group in groups
        ]  # fmt: skip

    def fits_one(self, available_bytes: int, context_tokens: int) -> bool:
        """The engine's start-up check: one request of the longest length in what is left without the null block."""
        if not self.unified_pool:
            return self.max_batch(available_bytes, context_tokens) > 0
        reserved = self.reserved_blocks * self.pool_bytes_per_block
        return self.bytes_per_request(context_tokens) <= available_bytes - reserved and available_bytes > reserved

    def max_batch(self, available_bytes: int, context_tokens: int) -> int:
        """Requests of ``context_tokens`` that hold their blocks at once."""
        if self.unified_pool:
            usable = self.num_blocks(available_bytes) - self.reserved_blocks
            return max(usable, 0) // self.blocks_per_request(context_tokens)
        needed = self.bytes_per_request(context_tokens)
        held = max(available_bytes, 0) // needed if needed else 0
        return min([held, *(self._pool_holds(pool, available_bytes) for pool in self.padded_pools)])

    @cached_property
    def padded_pools(self) -> tuple[Pool, ...]:
        """Pools with padding; a request of any length holds the same blocks of them."""
        return tuple(pool for pool in self.pools if pool.padding_blocks)

    def pool_blocks(self, pool: Pool, available_bytes: int) -> int:
        """Blocks of ``pool`` that requests can use, on the rank where they are largest."""
        return max(int(max(available_bytes, 0) * pool.share) // self.pool_block_bytes(pool) - pool.padding_blocks, 0)

    def pool_block_bytes(self, pool: Pool) -> int:
        """Bytes of a block of ``pool`` on the rank where it takes most."""
        return max(1, *(sum(groups[index].bytes_per_block for index in pool.groups) for groups in self.rank_groups))

    def pool_request_blocks(self, pool: Pool) -> int:
        """Blocks of ``pool`` that one request of any length holds."""
        return max(self.groups[index].blocks(1, 0) for index in pool.groups)

    def _pool_holds(self, pool: Pool, available_bytes: int) -> int:
        return self.pool_blocks(pool, available_bytes) // self.pool_request_blocks(pool)

    def bytes_to_hold(self, num_requests: int, context_tokens: int) -> int:
        """KV bytes of a GPU that hold ``num_requests`` of ``context_tokens``, with what no request can use."""
        if (fixed := sum(pool.fixed_bytes for pool in self.pools)) > 0:
            needs, rest = self.pool_needs(context_tokens), sum(p.share for p in self.pools if not p.fixed_bytes)
            others = (needs[p.name] * rest / p.share for p in self.pools if not p.fixed_bytes)
            return fixed + ceil(num_requests * max(others))
        needed = num_requests * self.bytes_per_request(context_tokens)
        padded = (
            ceil((num_requests * self.pool_request_blocks(p) + p.padding_blocks) * self.pool_block_bytes(p) / p.share)
            for p in self.padded_pools
        )
        return max([needed + self.reserved_blocks * self.pool_bytes_per_block, *padded])

    def max_concurrency(self, available_bytes: int, max_model_len_tokens: int) -> float:
        """What vLLM logs as "Maximum concurrency": ``num_blocks / blocks of the longest request``, null block in."""
        if not self.unified_pool:
            return available_bytes / self.bytes_per_request(max_model_len_tokens)
        return self.num_blocks(available_bytes) / self.blocks_per_request(max_model_len_tokens)

    def capacity_tokens(self, available_bytes: int, max_model_len_tokens: int) -> int:
        """What the engine logs as its KV cache size in tokens."""
        if self.pools:
            return self.num_blocks(available_bytes) * self.block_size_tokens * self.dcp_size
        if self.legacy_tokens:
            return self.num_blocks(available_bytes) // max(len(self.groups), 1) * self.block_size_tokens
        return int(self.max_concurrency(available_bytes, max_model_len_tokens) * max_model_len_tokens)

    def max_context(self, available_bytes: int, batch_size: int, limit_tokens: int) -> int | None:
        """The longest context that ``batch_size`` requests can hold at once, up to ``limit_tokens``; None when none."""
        low, high = 0, limit_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.max_batch(available_bytes, middle) >= batch_size:
                low = middle
            else:
                high = middle - 1
        return low or None
