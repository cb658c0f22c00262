# mypy: disable-error-code="untyped-decorator"
"""Numba kernels that read a trellis in plane order (called by `cpu`).

`multiply` is a product with few rows of x, `decode` makes strips of the dense matrix, `take_rows`
the rows of an embedding. A row needs itself and the two before it, so any rows are decoded alone. A
weight costs a shift and a load from a table of at most 4096 floats, which stays in L1. `decode` and
`take_rows` are bit for bit what `reference` computes. Nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import (  # noqa: TID253 (this file is made of it)
    carray,
    float32,
    int8,
    int32,
    int64,
    njit,
    uint8,
    uint32,
)

from mgvq_kernels.cpu_jit import compile_cached, pointer
from mgvq_kernels.cpu_order import STRIP_ROWS
from mgvq_kernels.cpu_trellis_order import BAND_FIELDS
from mgvq_kernels.layout import TRELLIS_RATES, TRELLIS_WINDOWS
from mgvq_kernels.trellis import GROUP_WEIGHTS, SEGMENT_ROWS

HEAD_FIELDS = 9
"""Numbers of a descriptor, as `cpu_trellis_order.describe` writes it."""

MOST_ENTRIES = 1 << max(TRELLIS_WINDOWS)


@njit
def _previous(row: int, out_features: int) -> int:
    """Name the row whose bits come before a row's, as `trellis.previous_rows` does."""
    if row % SEGMENT_ROWS:
        return row - 1
    last = max(1, out_features // SEGMENT_ROWS) - 1
    if row // SEGMENT_ROWS > last:
        return row - 1
    return out_features - 1 if row // SEGMENT_ROWS == last else row + SEGMENT_ROWS - 1


@njit
def _row_bytes(codes: int, row: int, out_features: int, groups: int, rate: int) -> Any:
    """Return a row's own bytes, the last bytes before them, and those before the last."""
    size = groups * rate
    previous = _previous(row, out_features)
    above = codes + previous * size + size - groups
    beyond = above - groups
    if rate == 1:
        beyond = codes + _previous(previous, out_features) * size
    return (
        carray(pointer(codes + row * size), size, uint8),
        carray(pointer(above), groups, uint8),
        carray(pointer(beyond), groups, uint8),
    )


@njit
def _fill_words(head: Any, band: Any, row: int, low: Any, high: Any) -> None:
    """Write the stream's 32 bits up to the end of each group of a row, and up to two bytes in it.

    All windows of a group end in one or the other; at 1 and 2 bits the first holds them all.
    """
    groups, rate = band[2], band[3]
    own, above, beyond = _row_bytes(head[0] + band[0], row, head[7], groups, rate)
    if rate == 1:
        for g in range(groups):
            low[g] = own[g] | above[g] << uint32(8) | beyond[g] << uint32(16)
        return
    for g in range(groups):
        history = uint32(above[g]) << uint32(16) | uint32(beyond[g]) << uint32(24)
        high[g] = history | uint32(own[g]) << uint32(8) | own[groups + g]
    if rate == 2:
        low[:groups] = high[:groups]
    elif rate == 3:
        for g in range(groups):
            low[g] = high[g] << uint32(8) | own[2 * groups + g]
    elif rate == 4:
        for g in range(groups):
            last = uint32(own[2 * groups + g]) << uint32(8) | own[3 * groups + g]
            low[g] = high[g] << uint32(16) | last
    else:
        for g in range(groups):
            last = uint32(own[2 * groups + g]) << uint32(8) | own[3 * groups + g]
            low[g] = high[g] << uint32(24) | last << uint32(8) | own[4 * groups + g]


@njit
def _plane(rate: int, i: int, low: Any, high: Any) -> Any:
    """Choose the words that hold the windows of weight i of each group, and how far in they are."""
    behind = rate * (GROUP_WEIGHTS - 1 - i)
    if behind <= 32 - max(TRELLIS_WINDOWS):
        return low, uint32(behind)
    return high, uint32(behind - 8 * (rate - 2))


@njit
def _decode_row(band: Any, low: Any, high: Any, table: Any, scale: Any, out: Any) -> None:
    """Decode one row of a band from its words, scaled."""
    groups, rate = band[2], band[3]
    mask = uint32((1 << band[4]) - 1)
    for i in range(GROUP_WEIGHTS):
        words, shift = _plane(rate, i, low, high)
        plane = out[i * groups : (i + 1) * groups]
        for g in range(groups):
            plane[g] = table[(words[g] >> shift) & mask] * scale


def _make_dot_words(rate: int) -> Any:
    """Make the function that multiplies one row of a band, from its words, by x."""

    # The order of this sum, and of the next one's, is left to the compiler, which then works on
    # many groups at once. With the rate known it unrolls the eight weights of a group: 0.36 ns a
    # weight where decoding and then multiplying takes 0.5.
    @njit(fastmath={"reassoc", "contract"})
    def dot_words(groups: int, mask: Any, low: Any, high: Any, table: Any, x: Any) -> Any:
        total = float32(0.0)
        for g in range(groups):
            for i in range(GROUP_WEIGHTS):
                words, shift = _plane(rate, i, low, high)
                total += table[(words[g] >> shift) & mask] * x[i * groups + g]
        return total

    return dot_words


_dot_words_1, _dot_words_2, _dot_words_3, _dot_words_4, _dot_words_5 = map(
    _make_dot_words, TRELLIS_RATES
)


@njit
def _dot_words(band: Any, low: Any, high: Any, table: Any, x: Any) -> Any:
    """Multiply one row of a band, from its words, by x in the band's columns."""
    groups, rate = band[2], band[3]
    mask = uint32((1 << band[4]) - 1)
    if rate == 1:
        return _dot_words_1(groups, mask, low, high, table, x)
    if rate == 2:
        return _dot_words_2(groups, mask, low, high, table, x)
    if rate == 3:
        return _dot_words_3(groups, mask, low, high, table, x)
    if rate == 4:
        return _dot_words_4(groups, mask, low, high, table, x)
    return _dot_words_5(groups, mask, low, high, table, x)


@njit(fastmath={"reassoc", "contract"})
def _dot(row: Any, x: Any) -> Any:
    """Multiply a decoded row by x."""
    total = float32(0.0)
    for j in range(row.size):
        total += row[j] * x[j]
    return total


@njit
def _fill_table(head: Any, band: Any, b: int, table: Any) -> None:
    """Write a band's codebook as floats, its scale multiplied in."""
    entries = 1 << band[4]
    book = carray(pointer(head[1] + band[5]), entries, int8)
    scale = carray(pointer(head[2]), head[6], float32)[b]
    for e in range(entries):
        table[e] = float32(book[e]) * scale


@njit
def _scratch(in_features: int) -> Any:
    """Make room for a table, the two words of every group, and a decoded row."""
    groups = in_features // GROUP_WEIGHTS
    return (
        np.empty(MOST_ENTRIES, np.float32),
        np.empty(groups, np.uint32),
        np.empty(groups, np.uint32),
        np.empty(in_features, np.float32),
    )


@compile_cached
def multiply(
    x_address: int,
    y_address: int,
    bias_address: int,
    rows: int,
    descriptor: int,
    first_strip: int,
    last_strip: int,
) -> None:
    """Multiply `x [rows, I]` by strips of a matrix: y[:, first * 64 : last * 64], all float32."""
    head = carray(pointer(descriptor), HEAD_FIELDS, int64)
    bands = carray(pointer(head[5]), (head[6], BAND_FIELDS), int64)
    out_features, in_features = head[7], head[8]
    row_scales = carray(pointer(head[3]), out_features, float32)
    order = carray(pointer(head[4]), in_features, int32)
    x = carray(pointer(x_address), (rows, in_features), float32)
    y = carray(pointer(y_address), (rows, out_features), float32)
    ordered = np.empty((rows, in_features), np.float32)
    for t in range(rows):
        for j in range(in_features):
            ordered[t, j] = x[t, order[j]]
    table, low, high, decoded = _scratch(in_features)
    begin, end = first_strip * STRIP_ROWS, min(out_features, last_strip * STRIP_ROWS)
    y[:, begin:end] = 0.0
    for b in range(head[6]):
        band = bands[b]
        _fill_table(head, band, b, table)
        first, last = band[1], band[1] + GROUP_WEIGHTS * band[2]
        for row in range(begin, end):
            _fill_words(head, band, row, low, high)
            if rows == 1:
                y[0, row] += _dot_words(band, low, high, table, ordered[0, first:last])
                continue
            _decode_row(band, low, high, table, float32(1.0), decoded)
            for t in range(rows):
                y[t, row] += _dot(decoded[: last - first], ordered[t, first:last])
    for t in range(rows):
        for row in range(begin, end):
            y[t, row] *= row_scales[row]
    if bias_address:
        bias = carray(pointer(bias_address), out_features, float32)
        for t in range(rows):
            for row in range(begin, end):
                y[t, row] += bias[row]


@compile_cached
def decode(out_address: int, descriptor: int, first_strip: int, last_strip: int) -> None:
    """Decode strips of a matrix into `out [O, I]` float32, columns in plane order."""
    head = carray(pointer(descriptor), HEAD_FIELDS, int64)
    bands = carray(pointer(head[5]), (head[6], BAND_FIELDS), int64)
    out_features, in_features = head[7], head[8]
    row_scales = carray(pointer(head[3]), out_features, float32)
    table, low, high, _ = _scratch(in_features)
    begin, end = first_strip * STRIP_ROWS, min(out_features, last_strip * STRIP_ROWS)
    for b in range(head[6]):
        band = bands[b]
        _fill_table(head, band, b, table)
        width = GROUP_WEIGHTS * band[2]
        for row in range(begin, end):
            place = out_address + 4 * (row * in_features + band[1])
            out = carray(pointer(place), width, float32)
            _fill_words(head, band, row, low, high)
            _decode_row(band, low, high, table, row_scales[row], out)


@compile_cached
def take_rows(ids_address: int, count: int, out_address: int, descriptor: int) -> None:
    """Decode the rows `ids [count]` int64 into `out [count, I]` float32, original channel order."""
    head = carray(pointer(descriptor), HEAD_FIELDS, int64)
    bands = carray(pointer(head[5]), (head[6], BAND_FIELDS), int64)
    out_features, in_features = head[7], head[8]
    row_scales = carray(pointer(head[3]), out_features, float32)
    order = carray(pointer(head[4]), in_features, int32)
    ids = carray(pointer(ids_address), count, int64)
    result = carray(pointer(out_address), (count, in_features), float32)
    table, low, high, row = _scratch(in_features)
    for b in range(head[6]):
        band = bands[b]
        _fill_table(head, band, b, table)
        first, last = band[1], band[1] + GROUP_WEIGHTS * band[2]
        for i in range(count):
            _fill_words(head, band, ids[i], low, high)
            _decode_row(band, low, high, table, row_scales[ids[i]], row[first:last])
            for j in range(first, last):
                result[i, order[j]] = row[j]
