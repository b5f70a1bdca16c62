"""The KV formats the kernels read: how many bits an element takes, which codes are finite, which scales go with it.

Nothing here imports torch or triton.
"""

from dataclasses import dataclass

LAYOUTS = ("HND", "NHD")
BLOCK_SIZES_TOKENS = (1, 16, 32, 64, 128, 256)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
INLINE_SLOT_BYTES = 16
"""Bytes that vLLM's inline layout adds to each row for its FP32 scale (4 used, 12 padding)."""


@dataclass(frozen=True)
class KvFormat:
    """One element format of a KV cache.

    `code` is the number the kernels switch on; `torch_dtype` the name of the storage dtype; `max_value` the largest
    magnitude a quantiser maps to (None: not quantised).
    """

    name: str
    code: int
    element_bits: int
    torch_dtype: str
    max_value: float | None
    scale_granularities: tuple[str, ...]

    @property
    def quantised(self) -> bool:
        """True for formats that store a scaled value."""
        return self.max_value is not None


_EIGHT_BIT_SCALES = ("none", "tensor", "head", "token_head", "token_head_inline")

FORMATS = {
    f.name: f
    for f in (
        KvFormat("bf16", 0, 16, "bfloat16", None, ("none",)),
        KvFormat("fp16", 0, 16, "float16", None, ("none",)),
        KvFormat("fp8_e4m3", 1, 8, "float8_e4m3fn", 448.0, _EIGHT_BIT_SCALES),
        KvFormat("fp8_e5m2", 2, 8, "float8_e5m2", 57344.0, _EIGHT_BIT_SCALES),
        KvFormat("int8", 3, 8, "int8", 127.0, _EIGHT_BIT_SCALES[1:]),
        KvFormat("int4", 4, 4, "uint8", 7.0, ("block",)),
        KvFormat("nvfp4", 5, 4, "uint8", 6.0, ("block",)),
    )
}


LATENT_DIM, ROPE_DIM = 512, 64
LATENT_ROW_BYTES = {"bf16": 1152, "fp8_e4m3": 576, "fp8_ds_mla": 656}
"""Latent attention: numbers of a row that are values too, those that are not; bytes of a row by format."""
LATENT_HEADS_A_PROGRAM = 32
SCALE_BLOCK_DIMS = {"int4": 32, "nvfp4": 16}
"""Numbers of a row that share one scale in the 4-bit formats: FP16 for int4, e4m3 (times one FP32) for nvfp4."""
FOUR_BIT_HEAD_DIMS = (64, 128, 256)


def int4_plane_dims(head_dim: int) -> int:
    """Dims of a plane of an int4 row: 32, one block, or a quarter of a smaller row.

    A row is one or two sections of four planes; nibble j of a section's 16-bit word w is dim j * plane + w of it.
    (nvfp4 rows are in order: a byte holds dims 2i and 2i + 1, the even one in its low nibble.)
    """
    return min(32, head_dim // 4)


def kv_format(name: str) -> KvFormat:
    """The format called `name`; ValueError, listing the known ones, when there is none."""
    if name not in FORMATS:
        raise ValueError(f"KV format {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


def row_bytes(fmt: KvFormat, head_dim: int, scale_granularity: str) -> tuple[int, int]:
    """Bytes of one token's K (or V) of one head: (in the cache row, in a separate scale buffer).

    Per-tensor and per-head scales are a few bytes for the whole cache and count as zero here.
    """
    data = head_dim * fmt.element_bits // 8
    if scale_granularity == "token_head":
        return data, 4
    if scale_granularity == "token_head_inline":
        return data + INLINE_SLOT_BYTES, 0
    if scale_granularity == "block":
        return data, head_dim // SCALE_BLOCK_DIMS[fmt.name] * (2 if fmt.name == "int4" else 1)
    return data, 0


def check_cache_shape(
    fmt: KvFormat, scale_granularity: str, layout: str, block_size_tokens: int, head_dim: int
) -> None:
    """ValueError with one clear line when the kernels do not read such a cache."""
    for what, value, known in (
        ("layout", layout, LAYOUTS),
        ("block_size_tokens", block_size_tokens, BLOCK_SIZES_TOKENS),
        ("head_dim", head_dim, FOUR_BIT_HEAD_DIMS if fmt.element_bits == 4 else HEAD_DIMS),
        (f"scale_granularity of {fmt.name}", scale_granularity, fmt.scale_granularities),
    ):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not one of {', '.join(map(str, known))}")


def latent_head_blocks(num_heads: int) -> int:
    """Programs that `num_heads` query heads on one latent row are split among, evenly; ValueError where they cannot."""
    blocks = -(-num_heads // LATENT_HEADS_A_PROGRAM)
    if num_heads < 1 or num_heads % blocks:
        raise ValueError(
            f"{num_heads} query heads do not split evenly among programs of at most {LATENT_HEADS_A_PROGRAM}"
        )
    return blocks
