# mypy: disable-error-code="untyped-decorator"
"""Numba kernels that turn codes in strip order back into weights (called by `cpu`).

`decode` makes strips of the dense matrix, `take_rows` the rows of an embedding. Bit for bit what
`reference` computes: stages are summed first, the row scale multiplies last. Nothing is
checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, int32, int64, njit, uint8  # noqa: TID253 (this file is made of it)

from mgvq_kernels.cpu_jit import compile_cached, pointer
from mgvq_kernels.cpu_order import STRIP_ROWS, TILE_FIELDS


def _make_decode_tile(dim: int) -> Any:
    """Make the function that decodes one strip of a tile of vector dimension `dim`."""

    @njit
    def decode_tile(
        codes: Any, groups: int, table: Any, scales: Any, is_first: int, out: Any, stride: int
    ) -> None:
        entries = np.empty(256 * dim, np.float32)  # [256, d]: one entry side by side
        for e in range(256):
            for k in range(dim):
                entries[e * dim + k] = table[k * 256 + e]
        for r in range(scales.size):
            row = out[r * stride : r * stride + groups * dim]
            scale = scales[r]
            if is_first:
                for g in range(groups):
                    at = int64(codes[g * STRIP_ROWS + r]) * dim
                    for k in range(dim):
                        row[g * dim + k] = entries[at + k] * scale
            else:
                for g in range(groups):
                    at = int64(codes[g * STRIP_ROWS + r]) * dim
                    for k in range(dim):
                        row[g * dim + k] = (row[g * dim + k] + entries[at + k]) * scale

    return decode_tile


_decode_tile_1 = _make_decode_tile(1)
_decode_tile_2 = _make_decode_tile(2)
_decode_tile_4 = _make_decode_tile(4)
_decode_tile_8 = _make_decode_tile(8)


@compile_cached
def decode(out_address: int, descriptor: int, first_strip: int, last_strip: int) -> None:
    """Decode strips of a matrix into `out [O, I]` float32, permuted channel order."""
    head = carray(pointer(descriptor), 8, int64)
    tiles = carray(pointer(head[4]), (head[5], TILE_FIELDS), int64)
    out_features, in_features = head[6], head[7]
    row_scales = carray(pointer(head[2]), out_features, float32)
    ones = np.ones(STRIP_ROWS, np.float32)
    for strip in range(first_strip, last_strip):
        begin = strip * STRIP_ROWS
        count = min(out_features - begin, STRIP_ROWS)
        for t in range(head[5]):
            groups, dim = tiles[t, 2], tiles[t, 3]
            table = carray(pointer(head[1] + 4 * tiles[t, 4]), dim * 256, float32)
            place = head[0] + tiles[t, 0] + strip * groups * STRIP_ROWS
            codes = carray(pointer(place), groups * STRIP_ROWS, uint8)
            start = out_address + 4 * (begin * in_features + tiles[t, 1])
            size = (count - 1) * in_features + groups * dim
            out = carray(pointer(start), size, float32)
            scales = row_scales[begin : begin + count] if tiles[t, 6] else ones[:count]
            if dim == 4:
                _decode_tile_4(codes, groups, table, scales, tiles[t, 5], out, in_features)
            elif dim == 8:
                _decode_tile_8(codes, groups, table, scales, tiles[t, 5], out, in_features)
            elif dim == 2:
                _decode_tile_2(codes, groups, table, scales, tiles[t, 5], out, in_features)
            else:
                _decode_tile_1(codes, groups, table, scales, tiles[t, 5], out, in_features)


@compile_cached
def take_rows(ids_address: int, count: int, out_address: int, descriptor: int) -> None:
    """Decode the rows `ids [count]` int64 into `out [count, I]` float32, original channel order."""
    head = carray(pointer(descriptor), 8, int64)
    tiles = carray(pointer(head[4]), (head[5], TILE_FIELDS), int64)
    out_features, in_features = head[6], head[7]
    row_scales = carray(pointer(head[2]), out_features, float32)
    ids = carray(pointer(ids_address), count, int64)
    result = carray(pointer(out_address), (count, in_features), float32)
    row = np.empty(in_features, np.float32)
    for i in range(count):
        row[:] = 0.0
        strip, lane = ids[i] // STRIP_ROWS, ids[i] % STRIP_ROWS
        for t in range(head[5]):
            groups, dim = tiles[t, 2], tiles[t, 3]
            table = carray(pointer(head[1] + 4 * tiles[t, 4]), dim * 256, float32)
            place = head[0] + tiles[t, 0] + strip * groups * STRIP_ROWS
            codes = carray(pointer(place), groups * STRIP_ROWS, uint8)
            for g in range(groups):
                code = int64(codes[g * STRIP_ROWS + lane])
                for k in range(dim):
                    row[tiles[t, 1] + g * dim + k] += table[k * 256 + code]
        if head[3]:
            permutation = carray(pointer(head[3]), in_features, int32)
            for j in range(in_features):
                result[i, permutation[j]] = row[j] * row_scales[ids[i]]
        else:
            for j in range(in_features):
                result[i, j] = row[j] * row_scales[ids[i]]
