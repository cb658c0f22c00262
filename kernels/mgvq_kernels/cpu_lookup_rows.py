# mypy: disable-error-code="untyped-decorator"
"""Numba kernel that looks a packed matrix up for eight rows of x at a time (called by `cpu`).

Where bytes cannot be permuted a code costs a gather and an addition a row. Here the partial sums of
eight rows lie side by side, so that a code costs one load and one addition of eight numbers for all
of them. Additions are in the order of `cpu_lookup`'s float32 way: every row is, bit for bit, what
it is alone. Nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, float32, int32, int64, njit, types  # noqa: TID253 (this file is made of it)
from numba.core import cgutils  # noqa: TID253
from numba.extending import intrinsic  # noqa: TID253

from mgvq_kernels.cpu_jit import compile_cached, pointer
from mgvq_kernels.cpu_order import STRIP_ROWS, TILE_FIELDS

LANES = 8
"""Rows of x that share a load: one 256-bit register of float32."""

TABLE_GROUPS = 4
"""Code groups whose partial sums are held at once: 8 KiB each, for L1."""

BLOCK_STRIPS = 64
"""Strips that a table serves before the next one is made; their sums take 128 KiB of L2."""

ENTRY_BYTES = 4 * LANES
GROUP_BYTES = 256 * ENTRY_BYTES

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_FLOAT = ir.FloatType()
_ROWS = ir.VectorType(_FLOAT, LANES)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _make_partial_sums(dim: int) -> Any:
    """Make the intrinsic that fills the table of one group of vector dimension `dim`."""

    @intrinsic
    def partial_sums(typingctx: Any, x: Any, table: Any, out: Any) -> Any:
        """out[e] = sum over k of x[k] * table[k, e], eight rows each; addresses."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, table, out = args
            factors = [
                _load(builder, builder.add(x, _I64(ENTRY_BYTES * k)), _ROWS) for k in range(dim)
            ]
            nothing = ir.Constant(_ROWS, ir.Undefined)
            spread = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            with cgutils.for_range(builder, _I64(256), intp=_I64) as loop:
                place = builder.add(table, builder.shl(loop.index, _I64(2)))
                total = None
                for k in range(dim):
                    value = _load(builder, builder.add(place, _I64(1024 * k)), _FLOAT)
                    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
                    wide = builder.shuffle_vector(one, nothing, spread)
                    product = builder.fmul(factors[k], wide)
                    total = product if total is None else builder.fadd(total, product)
                offset = builder.mul(loop.index, _I64(ENTRY_BYTES))
                _store(builder, total, builder.add(out, offset))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return partial_sums


_partial_sums_1 = _make_partial_sums(1)
_partial_sums_2 = _make_partial_sums(2)
_partial_sums_4 = _make_partial_sums(4)
_partial_sums_8 = _make_partial_sums(8)


@intrinsic
def _add_strip(typingctx: Any, codes: Any, table: Any, groups: Any, sums: Any) -> Any:
    """Add to the 64 x 8 sums of a strip the entries its codes name in some groups; addresses.

    Eight output rows go together, so that eight chains of additions are in flight.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, table, groups, sums = args
        totals = [cgutils.alloca_once(builder, _ROWS) for _ in range(LANES)]
        with cgutils.for_range(builder, _I64(STRIP_ROWS // LANES), intp=_I64) as outer:
            first = builder.mul(outer.index, _I64(LANES))
            place = builder.add(sums, builder.mul(first, _I64(ENTRY_BYTES)))
            for i, total in enumerate(totals):
                at = builder.add(place, _I64(ENTRY_BYTES * i))
                builder.store(_load(builder, at, _ROWS), total)
            with cgutils.for_range(builder, groups, intp=_I64) as inner:
                entries = builder.add(table, builder.mul(inner.index, _I64(GROUP_BYTES)))
                row = builder.add(codes, builder.mul(inner.index, _I64(STRIP_ROWS)))
                row = builder.add(row, first)
                for i, total in enumerate(totals):
                    code = builder.zext(_load(builder, builder.add(row, _I64(i)), _I8), _I64)
                    at = builder.add(entries, builder.mul(code, _I64(ENTRY_BYTES)))
                    entry = _load(builder, at, _ROWS)
                    builder.store(builder.fadd(builder.load(total), entry), total)
            for i, total in enumerate(totals):
                _store(builder, builder.load(total), builder.add(place, _I64(ENTRY_BYTES * i)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@njit
def _side_by_side(x: Any, first: int, count: int, permutation: Any, lanes: Any) -> None:
    """lanes[channel, row] of `count` rows, in permuted order; other lanes are zero."""
    in_features = lanes.shape[0]
    lanes[:] = 0.0
    for r in range(count):
        begin = (first + r) * in_features
        if permutation.size:
            for j in range(in_features):
                lanes[j, r] = x[begin + permutation[j]]
        else:
            for j in range(in_features):
                lanes[j, r] = x[begin + j]


@njit
def _add_tile(
    tile: Any, head: Any, first: int, last: int, lanes: Any, table: Any, sums: Any
) -> None:
    """Add one tile to the sums of the strips first..last, a few groups at a time."""
    # Addresses are taken here and the arrays held by the caller: numba frees what nobody names.
    lanes_at, table_at, sums_at = lanes.ctypes.data, table.ctypes.data, sums.ctypes.data
    groups, dim = tile[2], tile[3]
    entries = head[1] + 4 * tile[4]
    for g in range(0, groups, TABLE_GROUPS):
        some = min(TABLE_GROUPS, groups - g)
        for i in range(some):
            x = lanes_at + (tile[1] + (g + i) * dim) * ENTRY_BYTES
            out = table_at + i * GROUP_BYTES
            if dim == 4:
                _partial_sums_4(x, entries, out)
            elif dim == 8:
                _partial_sums_8(x, entries, out)
            elif dim == 2:
                _partial_sums_2(x, entries, out)
            else:
                _partial_sums_1(x, entries, out)
        for s in range(first, last):
            codes = head[0] + tile[0] + (s * groups + g) * STRIP_ROWS
            _add_strip(codes, table_at, some, sums_at + (s - first) * STRIP_ROWS * ENTRY_BYTES)


@compile_cached
def lookup_rows(
    x_address: int,
    y_address: int,
    bias_address: int,
    rows: int,
    descriptor: int,
    first_strip: int,
    last_strip: int,
) -> None:
    """Multiply `x [rows, I]` by strips of a matrix: y[:, first * 64 : last * 64], all float32."""
    head = carray(pointer(descriptor), 8, int64)
    tiles = carray(pointer(head[4]), (head[5], TILE_FIELDS), int64)
    out_features, in_features = head[6], head[7]
    row_scales = carray(pointer(head[2]), out_features, float32)
    permutation = carray(pointer(head[3]), in_features if head[3] else 0, int32)
    bias = carray(pointer(bias_address), out_features if bias_address else 0, float32)
    x = carray(pointer(x_address), rows * in_features, float32)
    y = carray(pointer(y_address), (rows, out_features), float32)
    lanes = np.empty((in_features, LANES), np.float32)
    table = np.empty(TABLE_GROUPS * 256 * LANES + 16, np.float32)
    table = table[(64 - table.ctypes.data % 64) % 64 // 4 :]
    most = min(BLOCK_STRIPS, last_strip - first_strip)
    sums = np.empty((most * STRIP_ROWS + 2, LANES), np.float32)
    sums = sums[(64 - sums.ctypes.data % 64) % 64 // ENTRY_BYTES :]
    for first_row in range(0, rows, LANES):
        count = min(LANES, rows - first_row)
        _side_by_side(x, first_row, count, permutation, lanes)
        for first in range(first_strip, last_strip, BLOCK_STRIPS):
            last = min(last_strip, first + BLOCK_STRIPS)
            sums[:] = 0.0
            for t in range(head[5]):
                _add_tile(tiles[t], head, first, last, lanes, table, sums)
            begin, end = first * STRIP_ROWS, min(out_features, last * STRIP_ROWS)
            for r in range(count):
                for o in range(begin, end):
                    y[first_row + r, o] = sums[o - begin, r] * row_scales[o]
                if bias_address:
                    for o in range(begin, end):
                        y[first_row + r, o] += bias[o]
