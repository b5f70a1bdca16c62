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
    thread (None: the compiler's choice).
    """

    block_n: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int | None = None
    max_registers: int | None = None


def _capped(*shapes: tuple[int, int, int], registers: int | None = 168) -> tuple[Config, ...]:
    return tuple(Config(*shape, max_registers=registers) for shape in shapes)


# (bits of an element, head_dim, more than 8 query heads a KV head)
_DECODE = {
    (4, 64, False): _capped((128, 1, 3), (64, 1, 3), registers=None),
    (4, 128, False): _capped((64, 1, 3), registers=None) + _capped((32, 1, 3), (32, 1, 4)),
    (4, 256, False): _capped((64, 2, 3), registers=None),
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


_UNCAPPED_FROM_SM100 = {(8, 80, False), (16, 64, False)}
"""Shapes whose programs of two warps spill there with 168 registers a thread."""


def decode_configs(arch: int | None, element_bits: int, head_dim: int, group_size: int) -> tuple[Config, ...]:
    """Candidates for decode attention, the default first; `arch` None: a CPU or ROCm."""
    if arch is None:
        return (Config(32, 4, 2),)
    shape = (element_bits, head_dim, group_size > 8)
    if arch >= 100 and shape in _UNCAPPED_FROM_SM100:
        return tuple(replace(c, max_registers=None) if c.num_warps == 2 else c for c in _DECODE[shape])
    return _DECODE[shape]


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
