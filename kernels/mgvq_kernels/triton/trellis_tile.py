"""The device functions that decode a tile of a trellis, and a guard for launches (called by the
trellis kernels).

A unit's `RATE` words say its 32 windows at places that are known when the kernel is compiled: a
window costs a shift (of two words where it spans them) and a mask. The 32 windows of a unit are
joined in the registers of the thread that loaded its words, and one one-dimensional gather, which
goes through shared memory, reads all of them from the table. A weight then costs 4.9 instructions
from its word to its sum; reads from memory would cost 6.6, for their 64-bit addresses (7.5 of int8,
which must be converted; triton 3.9, sm_90, 2026-11; counted, not timed).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.trellis_order import TILE_ROWS as _TILE_ROWS
from mgvq_kernels.trellis_order import UNIT_ROWS as _UNIT_ROWS

TILE_ROWS = tl.constexpr(_TILE_ROWS)
UNIT_ROWS = tl.constexpr(_UNIT_ROWS)
UNITS = tl.constexpr(_TILE_ROWS // _UNIT_ROWS)
UNIT_WEIGHTS = tl.constexpr(_UNIT_ROWS * 8)

TABLE_SIZE = tl.constexpr(4096)
"""Entries of the table in shared memory: a shorter window's codebook is repeated in it."""


@contextlib.contextmanager
def zeroed_after_error(counters: Tensor) -> Iterator[None]:
    """Zero a weight's counters where its launches, one a rate, break off: some have counted.

    A rate may have to be compiled first, and Ctrl-C may come in the seconds that this takes.
    """
    try:
        yield
    except BaseException:
        counters.zero_()
        raise


@triton.jit
def place_band(fields_ptr, tile, RATE: tl.constexpr):
    """Say where a band's tile lies: first word, first halo; and first channel, groups."""
    groups = tl.load(fields_ptr + 6)
    before = tile.to(tl.int64) * groups  # of the tiles before
    word = tl.multiple_of(tl.load(fields_ptr + 7) + before * (RATE * UNITS), 64)
    return word, tl.load(fields_ptr + 8) + before, tl.load(fields_ptr + 5), groups


@triton.jit
def load_entries(books_ptr, fields_ptr):
    """Load a band's codebook: `[TABLE_SIZE]` int8, repeated if windows are shorter."""
    entry = tl.arange(0, TABLE_SIZE) & ((1 << tl.load(fields_ptr + 3)) - 1)
    return tl.load(books_ptr + tl.load(fields_ptr + 4) + entry)


@triton.jit
def load_table(books_ptr, book_scale_ptr, fields_ptr):
    """Load a band's codebook, scaled: `[TABLE_SIZE]` float32."""
    return load_entries(books_ptr, fields_ptr).to(tl.float32) * tl.load(book_scale_ptr)


@triton.jit
def load_words(
    codes_ptr,  # int32, at the band's tile
    halos_ptr,  # at the band's tile
    first_group,
    groups,
    RATE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Load the words of GROUPS groups and what came before each unit: six `[GROUPS, UNITS]`."""
    group = first_group + tl.arange(0, GROUPS)[:, None]
    unit = tl.arange(0, UNITS)[None, :]
    place = group * (UNITS * RATE) + unit
    present = group < groups
    above = codes_ptr + place + ((RATE - 1) * UNITS - 1)
    before = tl.load(tl.where(unit == 0, halos_ptr + group, above), mask=present, other=0)
    word0 = tl.load(codes_ptr + place, mask=present, other=0)
    word1, word2, word3, word4 = word0, word0, word0, word0
    if RATE > 1:
        word1 = tl.load(codes_ptr + place + UNITS, mask=present, other=0)
    if RATE > 2:
        word2 = tl.load(codes_ptr + place + 2 * UNITS, mask=present, other=0)
    if RATE > 3:
        word3 = tl.load(codes_ptr + place + 3 * UNITS, mask=present, other=0)
    if RATE > 4:
        word4 = tl.load(codes_ptr + place + 4 * UNITS, mask=present, other=0)
    return before, word0, word1, word2, word3, word4


@triton.jit
def window_at(words, RATE: tl.constexpr, PLACE: tl.constexpr):
    """Read the window of weight PLACE of every unit: `[GROUPS, UNITS]` int32."""
    END: tl.constexpr = RATE * (PLACE + 1)
    WORD: tl.constexpr = (END - 1) // 32
    SHIFT: tl.constexpr = 32 * (WORD + 1) - END
    window = words[WORD + 1].to(tl.uint32, bitcast=True) >> SHIFT
    if SHIFT > 20:  # 12 bits go beyond the word
        window |= words[WORD].to(tl.uint32, bitcast=True) << (32 - SHIFT)
    return (window & (TABLE_SIZE - 1)).to(tl.int32)


@triton.jit
def join_windows(words, RATE: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """Join every STRIDE-th window from FIRST on: `[GROUPS, UNITS, 2, 2, ..]`, in one thread."""
    if STRIDE == UNIT_WEIGHTS:
        windows = window_at(words, RATE, FIRST)
    else:
        even = join_windows(words, RATE, FIRST, 2 * STRIDE)
        odd = join_windows(words, RATE, FIRST + STRIDE, 2 * STRIDE)
        windows = tl.join(even, odd)
    return windows


@triton.jit
def look_up(table, words, RATE: tl.constexpr, GROUPS: tl.constexpr):
    """Read units' weights from a table: `[GROUPS, UNITS, UNIT_ROWS, 8]` of the table's dtype."""
    entries = join_windows(words, RATE, 0, 1)
    flat = tl.reshape(table, (TABLE_SIZE,))
    weights = tl.gather(flat, tl.reshape(entries, (GROUPS * UNITS * UNIT_WEIGHTS,)), 0)
    return tl.reshape(weights, (GROUPS, UNITS, UNIT_ROWS, 8))


@triton.jit
def look_up_rows(table, words, RATE: tl.constexpr, GROUPS: tl.constexpr):
    """Read units' weights and put them in rows: `[TILE_ROWS, GROUPS * 8]` of the table's dtype."""
    weights = tl.permute(look_up(table, words, RATE, GROUPS), (1, 2, 0, 3))
    return tl.reshape(weights, (TILE_ROWS, GROUPS * 8))
