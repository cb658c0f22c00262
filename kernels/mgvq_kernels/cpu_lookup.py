# mypy: disable-error-code="untyped-decorator"
"""Numba kernel that multiplies by a packed matrix through tables of partial sums (called by `cpu`).

A tile's partial sums (256 for each of 32 code groups) are made once for a row of x; every output
row then adds up the entries its codes name. Where the processor can permute bytes across two
registers (AVX512-VBMI) the partial sums are rounded to 16 bits relative to the tile's bound and
held as two byte planes, so that one instruction looks 64 codes up; elsewhere, and for values that
16 bits cannot hold (infinite, NaN, tiny), they stay float32 and are gathered one by one. Nothing
is checked here.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numpy as np
from llvmlite import ir
from numba import (  # noqa: TID253 (this file is made of it)
    carray,
    config,
    float32,
    int32,
    int64,
    njit,
    types,
    uint8,
)
from numba.core import cgutils  # noqa: TID253
from numba.extending import intrinsic  # noqa: TID253

from mgvq_kernels.cpu_jit import compile_cached, pointer
from mgvq_kernels.cpu_order import STRIP_ROWS, TILE_FIELDS, TILE_GROUPS, TOP_FLOATS

WIDE_STRIPS = 4
"""Strips a pass over a tile's planes serves: 16 of 32 registers accumulate, 8 hold the table."""

PLANE_BYTES = 512
"""Bytes of a group's two planes: 256 low bytes, then 256 high bytes."""

HALF = 32768.0
"""What is added to a rounded partial sum so that it is an unsigned 16-bit number."""

REACH = 32760.0
"""Largest rounded partial sum; a little under 32768 so that float rounding cannot pass it."""

TINY = 1e-30
"""Bounds below this go the float32 way: their reciprocal would overflow."""

HAS_VBMI = bool(
    llvmlite.binding.get_host_cpu_features().get("avx512vbmi", False)
    and config.CPU_NAME is None
    and config.CPU_FEATURES is None
)
"""Whether bytes can be permuted across two 512-bit registers here."""


def _make_accumulate(strips: int) -> Any:
    """Make the intrinsic that adds up the partial sums of one tile for some strips of rows."""

    @intrinsic
    def accumulate(
        typingctx: Any,
        codes: Any,
        planes: Any,
        groups: Any,
        sums: Any,
        step: Any,
        offset: Any,
    ) -> Any:
        signature = types.void(
            types.int64, types.int64, types.int64, types.int64, types.float32, types.float32
        )

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_accumulate(builder, args, strips)
            return context.get_dummy_value()

        return signature, codegen

    return accumulate


def _emit_accumulate(builder: Any, args: Any, strips: int) -> None:
    """Emit: sums[row] += step * (total of 16-bit partial sums) + offset, 64 * strips rows.

    In each 16-bit lane `all` gathers even byte + 256 * odd byte and `odd` the odd byte alone, so
    that the even rows' sum is `all - (odd << 8)`; 32 groups of 255 cannot pass 16 bits.
    """
    codes, planes, groups, sums, step, offset = args
    i8, i64 = ir.IntType(8), ir.IntType(64)
    bytes64, words32 = ir.VectorType(i8, 64), ir.VectorType(ir.IntType(16), 32)
    permute = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(bytes64, [bytes64, bytes64, bytes64]),
        "llvm.x86.avx512.vpermi2var.qi.512",
    )
    eight = ir.Constant(words32, [8] * 32)
    zero_bytes, zero_words = ir.Constant(bytes64, None), ir.Constant(words32, None)
    state = [cgutils.alloca_once_value(builder, zero_words) for _ in range(4 * strips)]

    def load(address: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

    def shifted(address: Any, places: int) -> Any:
        return builder.add(address, i64(places))

    strip_bytes = builder.mul(groups, i64(STRIP_ROWS))
    with cgutils.for_range(builder, groups, intp=i64) as loop:
        table = builder.add(planes, builder.mul(loop.index, i64(PLANE_BYTES)))
        low = [load(shifted(table, 64 * i), bytes64) for i in range(4)]
        high = [load(shifted(table, 256 + 64 * i), bytes64) for i in range(4)]
        place = builder.add(codes, builder.mul(loop.index, i64(STRIP_ROWS)))
        for s in range(strips):
            index = load(builder.add(place, builder.mul(strip_bytes, i64(s))), bytes64)
            is_upper = builder.icmp_signed("<", index, zero_bytes)
            for p, plane in enumerate((low, high)):
                lower = builder.call(permute, [plane[0], index, plane[1]])
                upper = builder.call(permute, [plane[2], index, plane[3]])
                found = builder.bitcast(builder.select(is_upper, upper, lower), words32)
                both, odd = state[4 * s + 2 * p], state[4 * s + 2 * p + 1]
                builder.store(builder.add(builder.load(both), found), both)
                builder.store(builder.add(builder.load(odd), builder.lshr(found, eight)), odd)
    _emit_totals(builder, state, sums, step, offset)


def _emit_totals(builder: Any, state: list[Any], sums: Any, step: Any, offset: Any) -> None:
    """Emit the end of `_emit_accumulate`: even and odd rows apart, scaled, added to sums."""
    i32 = ir.IntType(32)
    wide32, floats64 = ir.VectorType(i32, 32), ir.VectorType(ir.FloatType(), 64)
    eight = ir.Constant(ir.VectorType(ir.IntType(16), 32), [8] * 32)
    eight_wide = ir.Constant(wide32, [8] * 32)
    interleave = ir.Constant(
        ir.VectorType(i32, 64), [i32(r // 2 + 32 * (r % 2)) for r in range(STRIP_ROWS)]
    )
    spread = ir.Constant(ir.VectorType(i32, 64), [i32(0)] * 64)

    def splat(value: Any) -> Any:
        one = builder.insert_element(ir.Constant(floats64, ir.Undefined), value, i32(0))
        return builder.shuffle_vector(one, ir.Constant(floats64, ir.Undefined), spread)

    steps, offsets = splat(step), splat(offset)
    for s in range(len(state) // 4):
        low_all, low_odd, high_all, high_odd = (
            builder.load(slot) for slot in state[4 * s : 4 * s + 4]
        )
        low_even = builder.sub(low_all, builder.shl(low_odd, eight))
        high_even = builder.sub(high_all, builder.shl(high_odd, eight))
        halves = []
        for lo, hi in ((low_even, high_even), (low_odd, high_odd)):
            wide_hi = builder.shl(builder.zext(hi, wide32), eight_wide)
            halves.append(builder.add(builder.zext(lo, wide32), wide_hi))
        totals = builder.shuffle_vector(halves[0], halves[1], interleave)
        place = builder.add(sums, ir.IntType(64)(4 * STRIP_ROWS * s))
        place = builder.inttoptr(place, floats64.as_pointer())
        scaled = builder.fadd(builder.fmul(builder.sitofp(totals, floats64), steps), offsets)
        builder.store(builder.fadd(builder.load(place, align=4), scaled), place, align=4)


_accumulate_wide = _make_accumulate(WIDE_STRIPS)
_accumulate_one = _make_accumulate(1)


@njit
def _permuted(x: Any, permutation: Any) -> Any:
    """Copy rows of x to permuted channel order."""
    ordered = np.empty(x.size, np.float32)
    for r in range(x.size // permutation.size):
        begin = r * permutation.size
        for j in range(permutation.size):
            ordered[begin + j] = x[begin + permutation[j]]
    return ordered


@njit
def _measure(x: Any, channel: int, groups: int, dim: int, tops: Any) -> Any:
    """Return (largest magnitude a partial sum of the tile can have, whether 16 bits hold them)."""
    bound = float32(0.0)
    total = float32(0.0)
    for g in range(groups):
        reach = float32(0.0)
        for k in range(dim):
            reach += abs(x[channel + g * dim + k]) * tops[k]
        total += reach
        bound = max(bound, reach)
    return bound, (total == 0.0 or bound > TINY) and total < 3e38


@njit
def _partial_sums(x: Any, channel: int, groups: int, dim: int, table: Any, out: Any) -> None:
    """out[g * 256 + e] = sum over k of x[g, k] * table[k, e], float32."""
    for g in range(groups):
        at = channel + g * dim
        row = out[g * 256 : g * 256 + 256]
        if dim == 4:
            x0, x1, x2, x3 = x[at], x[at + 1], x[at + 2], x[at + 3]
            for e in range(256):
                row[e] = (
                    x0 * table[e] + x1 * table[256 + e] + x2 * table[512 + e] + x3 * table[768 + e]
                )
        elif dim == 2:
            x0, x1 = x[at], x[at + 1]
            for e in range(256):
                row[e] = x0 * table[e] + x1 * table[256 + e]
        else:
            row[:] = 0.0
            for k in range(dim):
                xk = x[at + k]
                for e in range(256):
                    row[e] += xk * table[k * 256 + e]


@njit
def _round_planes(sums: Any, groups: int, inverse: Any, planes: Any) -> None:
    """Round float partial sums to 16 bits and split them into byte planes."""
    for g in range(groups):
        row = sums[g * 256 : g * 256 + 256]
        low = planes[g * 512 : g * 512 + 256]
        high = planes[g * 512 + 256 : g * 512 + 512]
        for e in range(256):
            whole = int32(row[e] * inverse + float32(HALF + 0.5))
            low[e] = uint8(whole)
            high[e] = uint8(whole >> 8)


@njit
def _gather(codes: Any, partial: Any, groups: int, strips: int, sums: Any) -> None:
    """Add float32 partial sums one code at a time."""
    for s in range(strips):
        out = sums[s * STRIP_ROWS : s * STRIP_ROWS + STRIP_ROWS]
        for g in range(groups):
            at = (s * groups + g) * STRIP_ROWS
            place = codes[at : at + STRIP_ROWS]
            row = partial[g * 256 : g * 256 + 256]
            for r in range(STRIP_ROWS):
                out[r] += row[place[r]]


@njit
def _accumulate(place: int, planes: int, groups: int, strips: int, sums: int, bound: Any) -> None:
    """Add rounded partial sums by byte permutation, four strips a pass, then one by one."""
    step = bound / float32(REACH)
    offset = -step * float32(HALF) * float32(groups)
    done = 0
    while done + WIDE_STRIPS <= strips:
        at = place + done * groups * STRIP_ROWS
        _accumulate_wide(at, planes, groups, sums + done * STRIP_ROWS * 4, step, offset)
        done += WIDE_STRIPS
    while done < strips:
        at = place + done * groups * STRIP_ROWS
        _accumulate_one(at, planes, groups, sums + done * STRIP_ROWS * 4, step, offset)
        done += 1


@compile_cached
def lookup(
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
    strips = last_strip - first_strip
    sums = np.zeros(rows * strips * STRIP_ROWS, np.float32)
    partial = np.empty(TILE_GROUPS * 256 + 16, np.float32)
    partial = partial[(64 - partial.ctypes.data % 64) % 64 // 4 :]
    planes = np.empty(TILE_GROUPS * PLANE_BYTES + 64, np.uint8)
    planes = planes[(64 - planes.ctypes.data % 64) % 64 :]
    ordered = carray(pointer(x_address), rows * in_features, float32)
    if head[3]:
        ordered = _permuted(ordered, carray(pointer(head[3]), in_features, int32))
    for t in range(head[5]):
        groups, dim = tiles[t, 2], tiles[t, 3]
        table = carray(pointer(head[1] + 4 * tiles[t, 4]), dim * 256 + TOP_FLOATS, float32)
        place = head[0] + tiles[t, 0] + first_strip * groups * STRIP_ROWS
        for r in range(rows):
            channel = r * in_features + tiles[t, 1]
            bound, fits = _measure(ordered, channel, groups, dim, table[dim * 256 :])
            _partial_sums(ordered, channel, groups, dim, table, partial)
            out = sums[r * strips * STRIP_ROWS : (r + 1) * strips * STRIP_ROWS]
            if HAS_VBMI and fits:
                if bound == 0.0:
                    continue
                _round_planes(partial, groups, float32(REACH) / bound, planes)
                _accumulate(place, planes.ctypes.data, groups, strips, out.ctypes.data, bound)
            else:
                codes = carray(pointer(place), strips * groups * STRIP_ROWS, uint8)
                _gather(codes, partial, groups, strips, out)
    y = carray(pointer(y_address), (rows, out_features), float32)
    begin = first_strip * STRIP_ROWS
    count = min(out_features, last_strip * STRIP_ROWS) - begin
    for r in range(rows):
        for o in range(count):
            y[r, begin + o] = sums[r * strips * STRIP_ROWS + o] * row_scales[begin + o]
    if bias_address:
        bias = carray(pointer(bias_address), out_features, float32)
        for r in range(rows):
            for o in range(begin, begin + count):
                y[r, o] += bias[o]
