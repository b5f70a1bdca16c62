"""The few configurations each kernel may run with, per architecture, format and shape.

The tables are short on purpose: a measured choice among at most four (`bench.choose`), never an open-ended search.
No entry may spill registers: the usual ones are compiled for sm_89, sm_90 and sm_100 by every test run, the whole table
by the slow tests.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """Tile of `block_n` tokens, warps a program, software-pipelining stages.

    `ctas_per_sm` limits the programs a multiprocessor holds (None: as many as fit), `max_registers` the registers of a
    thread (None: the compiler's choice). `whole_runs`: for the kernel that copies whole runs of the cache, whose stages
    are tiles in flight.
    """

    block_n: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int | None = None
    max_registers: int | None = None
    whole_runs: bool = False


def _capped(*shapes: tuple[int, int, int], registers: int | None = 168) -> tuple[Config, ...]:
    return tuple(Config(*shape, max_registers=registers) for shape in shapes)


# (bits of an element, head_dim, more than 8 query heads a KV head)
_DECODE = {
    (4, 64, False): _capped((128, 1, 3), (64, 1, 3), registers=None),
    (4, 128, False): _capped((64, 1, 3), registers=None) + _capped((32, 1, 3), (32, 1, 4)),
    (4, 256, False): _capped((64, 2, 3), registers=248),
    (4, 64, True): _capped((32, 2, 3), registers=200),
    (4, 128, True): _capped((32, 1, 3), (64, 2, 3), registers=None),
    (4, 256, True): _capped((32, 2, 3), registers=None),
    (8, 64, False): _capped((64, 2, 3), (64, 2, 4)),
    (8, 80, False): _capped((64, 2, 3), (64, 4, 3)),
    (8, 96, False): _capped((64, 2, 3), registers=None) + _capped((64, 4, 3)),
    (8, 128, False): _capped((64, 4, 3), (64, 2, 3)),
    (8, 192, False): _capped((64, 4, 3), (32, 4, 3), registers=None),
    (8, 256, False): _capped((64, 4, 2), (64, 4, 3)),
    (8, 64, True): _capped((64, 2, 3), registers=None),
    (8, 80, True): _capped((64, 4, 3), registers=None),
    (8, 96, True): _capped((64, 4, 3), registers=None),
    (8, 128, True): _capped((64, 2, 3), registers=None),
    (8, 192, True): _capped((32, 8, 3), registers=None),
    (8, 256, True): _capped((32, 4, 3), registers=None),
    (16, 64, False): _capped((64, 4, 3), (64, 2, 3)),
    (16, 80, False): _capped((64, 2, 3), registers=248) + _capped((32, 2, 3)),
    (16, 96, False): _capped((64, 4, 2), (32, 2, 3)),
    (16, 128, False): _capped((64, 4, 3), (32, 2, 3), (64, 4, 2)),
    (16, 192, False): _capped((32, 4, 3), (32, 2, 2), registers=None),
    (16, 256, False): _capped((32, 4, 2), (32, 4, 3), registers=None),
    (16, 64, True): _capped((32, 2, 3)),
    (16, 80, True): _capped((32, 4, 3), registers=None),
    (16, 96, True): _capped((32, 4, 3), registers=None),
    (16, 128, True): _capped((32, 2, 3), registers=None),
    (16, 192, True): _capped((32, 8, 3), registers=None),
    (16, 256, True): _capped((32, 4, 2), registers=None),
}


def _runs(*shape: int, registers: int, ctas: int | None = None) -> tuple[Config, ...]:
    return (Config(*shape, ctas_per_sm=ctas, max_registers=registers, whole_runs=True),)


# (head_dim, scales inline, more than 8 query heads a KV head): whole runs of 8-bit rows
_RUNS = {
    (64, False, False): _runs(64, 2, 1, registers=168),
    (80, False, False): _runs(64, 2, 2, registers=232, ctas=4),
    (96, False, False): _runs(64, 2, 2, registers=208, ctas=4),
    (128, False, False): _runs(64, 2, 1, registers=200, ctas=4),
    (64, True, False): _runs(64, 2, 1, registers=176),
    (128, True, False): _runs(64, 2, 1, registers=232, ctas=4),
    (256, True, False): _runs(64, 4, 1, registers=216),
    (128, False, True): _runs(64, 2, 1, registers=248, ctas=4),
}


def run_configs(head_dim: int, inline: bool, group_size: int, block_size_tokens: int) -> tuple[Config, ...]:
    """Configurations for the kernel that copies whole runs, on NVIDIA GPUs; none where another reads faster.

    A tile of rows that are no power of two lies within a block: in small ones 16 tokens a warp, two tiles in flight.
    """
    found = _RUNS.get((head_dim, inline, group_size > 8), ())
    if (inline or head_dim & (head_dim - 1)) and any(c.block_n > block_size_tokens for c in found):
        warps = block_size_tokens // 16
        return _runs(block_size_tokens, warps, 2, registers=248, ctas=8 // warps)
    return found


_REGISTERS_FROM_SM100 = {(8, 80, 64, 2): None, (16, 64, 64, 2): None, (8, 192, 64, 4): 192}
"""By bits, head_dim, tile and warps: what spills there with 168 registers a thread, the compiler's own choice for the
last."""


def _from_sm100(element_bits: int, head_dim: int, config: Config) -> Config:
    key = (element_bits, head_dim, config.block_n, config.num_warps)
    return replace(config, max_registers=_REGISTERS_FROM_SM100.get(key, config.max_registers))


def decode_configs(
    arch: int | None, element_bits: int, head_dim: int, group_size: int, inline: bool = False
) -> tuple[Config, ...]:
    """Candidates for decode attention row by row, the default first; `arch` None: a CPU or ROCm.

    Scales inline take registers of their own: one configuration, which 168 a thread are enough for with head_dim 128.
    """
    if arch is None:
        return (Config(32, 4, 2),)
    shape = (element_bits, head_dim, group_size > 8)
    found = _DECODE[shape]
    if arch >= 100:
        found = tuple(_from_sm100(element_bits, head_dim, c) for c in found)
    if inline:
        return found[:1] if head_dim == 128 else (replace(found[0], max_registers=None),)
    return found


_ALONE = {
    8: (Config(64, 4, 4, ctas_per_sm=2, max_registers=128), Config(128, 4, 3, ctas_per_sm=2, max_registers=248)),
    16: (Config(64, 4, 3, ctas_per_sm=2, max_registers=248),),
}
"""By bits of an element, for a batch of one with head_dim 128 and at most 8 query heads a KV head."""


def alone_configs(element_bits: int, head_dim: int, group_size: int, scale_per_token: bool) -> tuple[Config, ...]:
    """Configurations for a batch of one that come before those of any batch: fewer and larger programs to join."""
    found = _ALONE.get(element_bits, ()) if head_dim == 128 and group_size <= 8 else ()
    return found[::-1] if scale_per_token else found


INLINE_TILES = {(4, 64): 64, (4, 128): 32, (2, 128): 32}
"""Tokens of a tile of `attend_inline` by (KV heads a program, head_dim); what is not here reads faster without it."""


def inline_config(arch: int | None, head_dim: int, heads: int, block_size_tokens: int) -> Config:
    """The configuration of `attend_inline` for `heads` KV heads a program and blocks of at least 16 tokens.

    A warp a head, eight warps a multiprocessor, and one tile in flight, or as many as make its bytes where blocks are
    smaller: more of any read slower.
    """
    whole = INLINE_TILES[heads, head_dim]
    tile = min(whole, block_size_tokens)
    return Config(tile, heads, 2 if arch is None else 1 + whole // tile, ctas_per_sm=8 // heads)


_SMALL_SHARED_MEMORY = (86, 89, 120)
"""Architectures with 99 KB of shared memory a program."""


def mla_config(arch: int | None, element_bits: int, num_heads: int) -> Config:
    """The configuration of latent decode with `num_heads` query heads a program."""
    if arch is None:
        return Config(32, 4, 2)
    if element_bits == 16 and (num_heads <= 16 or arch in _SMALL_SHARED_MEMORY):
        return Config(32, 4, 3 if num_heads <= 16 else 2)
    return Config(64, 4, 2)


def padded_head_dim(element_bits: int, head_dim: int) -> bool:
    """True where a head_dim that is no power of two runs faster as one padded tile than as two exact ones."""
    return element_bits == 8 and head_dim == 80
