"""Device functions: where the tokens of a tile lie in a paged cache.

A tile lies in one page where pages are at least as large (`PAGE >= BLOCK_N`), and has fixed offsets from its first row;
else each of its slots has a page of its own.
"""

import triton
import triton.language as tl


@triton.jit
def first_page(table, token, slots, last_page, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of a tile of the sequence that begins at `token`, or pages of its slots."""
    if PAGE >= BLOCK_N:
        page = tl.load(table + token // PAGE)
    else:
        page = tl.load(table + tl.minimum((token + slots) // PAGE, last_page))
    return page


@triton.jit
def page_ahead(table, token, slots, last_page, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of the tile after the one at `token`; past the sequence's end its last page."""
    if PAGE >= BLOCK_N:
        page = tl.load(table + tl.minimum((token + BLOCK_N) // PAGE, last_page))
    else:
        page = tl.load(table + tl.minimum((token + BLOCK_N + slots) // PAGE, last_page))
    return page


@triton.jit
def slot_in_page(token, slots, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Place within its page of the tile's first token, or of each of its slots."""
    if PAGE >= BLOCK_N:
        in_page = token % PAGE
    else:
        in_page = slots % PAGE
    return in_page


@triton.jit
def rows_at(ptr, row, offsets, UNIT: tl.constexpr, AXIS: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to a tile's rows: `row` in 16 bytes, `UNIT` elements each; `AXIS` is that of the row's elements.

    `offsets` are the slots' from the first, in elements, with that axis.
    """
    first = ptr + row.to(tl.int64) * UNIT
    if PAGE >= BLOCK_N:
        at = first + offsets
    else:
        at = tl.expand_dims(first, AXIS)
    return at


@triton.jit
def valid_slots(slots, token, seq_len, first_token, WINDOW: tl.constexpr):
    """Whether a slot holds a token that counts."""
    valid = slots < seq_len - token
    if WINDOW:
        valid = valid & (slots >= first_token - token)
    return valid
