# mypy: disable-error-code="untyped-decorator"
"""The Viterbi search of `trellis_search` in compiled code (called by it alone, with numba).

Costs are float32 and positive, so their bits order as they do: the lowest bits of a cost carry
which predecessor it came from, and one integer minimum finds both (a float comparison with a
separate index takes ten times as long). The step to the states that follow is written in vectors:
left to the compiler it is up to ten times as slow. Segments are cut over as many threads as torch
may use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import int32, literally, njit, types, uint8  # noqa: TID253 (this file is made of it)
from numba.extending import intrinsic  # noqa: TID253
from torch import Tensor

from mgvq_kernels.cpu_jit import compile_cached, lesser
from mgvq_kernels.cpu_threads import over_threads
from mgvq_quantizer.trellis_search import CLOSING

_RELEASE = 16
"""Steps after which the least cost is taken off all, so that they stay small."""
_UNREACHABLE = 1e30
_UNROLLED = 16
"""Predecessors a loop compares at a time: the compiler does not unroll one over 32, which took 4.2
us a weight where two over 16 take 0.3."""
_LANES = 16
"""States a step takes at a time, as many as the longest registers hold; shorter ones take turns."""


def encode(
    goal: Tensor, weights: Tensor, table: Tensor, rate: int, parts: Sequence[tuple[int, int]]
) -> Tensor:
    """Choose the entries `[O, 8]` of one block of columns; arguments as in `trellis_search`."""
    rows = torch.tensor(parts)
    entries = torch.empty(goal.shape, dtype=torch.int64)
    arrays = tuple(x.contiguous().numpy() for x in (goal, weights, table.flatten(), rows))
    find = _coder(rate)
    over_threads(lambda i, j: find(*arrays, CLOSING, entries.numpy(), i, j), 0, len(parts), 1, True)
    return entries


@functools.cache
def _coder(rate: int) -> Any:
    """Make the search of one rate.

    It closes over a number alone, so that a disk can keep it, and takes `CLOSING` as an argument:
    the disk would not notice that another file has changed.
    """

    @compile_cached
    def encode(  # type: ignore[no-untyped-def]
        goal, weights, table, rows, closing, entries, first, last
    ):
        for s in range(first, last):
            stream = goal[rows[s, 0] : rows[s, 1]].copy().reshape(-1)
            found = _encode_segment(stream, weights, table, closing, rate)
            entries[rows[s, 0] : rows[s, 1]] = found.reshape(-1, goal.shape[1])

    return encode


@njit
def _encode_segment(stream, weights, table, closing, rate):  # type: ignore[no-untyped-def]
    """Find the entries of a circular stream: `closing` around its ends first, then all."""
    n, followers = stream.size, table.size >> rate
    cost, best = np.empty(table.size, np.float32), np.empty(followers, np.float32)
    w = np.empty(n, np.float32)
    for t in range(n):
        w[t] = weights[t % weights.size]
    near = min(n, closing)
    came_from = np.empty((max(n, 2 * near), followers), np.uint8)
    found = np.empty(max(n, 2 * near), np.int64)
    around = np.concatenate((stream[n - near :], stream[:near]))
    w_around = np.concatenate((w[n - near :], w[:near]))
    cost[:] = 0.0
    _forward(around, w_around, table, cost, best, came_from, rate)
    _walk_back(np.argmin(cost), rate, came_from, 2 * near, found)
    state = found[near - 1] % followers
    cost[:] = _UNREACHABLE
    cost[state::followers] = 0.0
    _forward(stream, w, table, cost, best, came_from, rate)
    end = np.argmin(cost[state::followers]) * followers + state
    _walk_back(end, rate, came_from, n, found)
    return found[:n]


@njit
def _forward(stream, weights, table, cost, best, came_from, rate):  # type: ignore[no-untyped-def]
    """Pass over a stream; `rate` is known when this is compiled, so that loops are unrolled."""
    literally(rate)
    cost_bits, best_bits = cost.view(np.int32), best.view(np.int32)
    for t in range(stream.size):
        _survive(cost_bits, best_bits, came_from[t], rate)
        _branch(best, table, stream[t], weights[t], cost, rate)
        if t % _RELEASE == _RELEASE - 1:
            cost -= _least(cost)


@njit
def _survive(cost, best, came_from, rate):  # type: ignore[no-untyped-def]
    """Choose the best state before each state's lowest bits."""
    literally(rate)
    symbols, followers = 1 << rate, best.size
    few = min(symbols, _UNROLLED)
    keep, mask = int32(-symbols), int32(symbols - 1)
    for h in range(followers):
        low = cost[h] & keep
        for j in range(1, few):
            low = min(low, (cost[j * followers + h] & keep) | int32(j))
        best[h] = low
    if symbols > few:
        for h in range(followers):
            low = best[h]
            for j in range(few, symbols):
                low = min(low, (cost[j * followers + h] & keep) | int32(j))
            best[h] = low
    for h in range(followers):
        low = best[h]
        came_from[h] = uint8(low & mask)
        best[h] = low & keep


@njit
def _branch(best, table, x, w, cost, rate):  # type: ignore[no-untyped-def]
    """Step to all states that follow."""
    literally(rate)
    before, entry, after = best.ctypes.data, table.ctypes.data, cost.ctypes.data
    for s in range(0, cost.size, _LANES):
        _reach(rate, before + 4 * (s >> rate), entry + 4 * s, after + 4 * s, x, w)


@intrinsic(prefer_literal=True)
def _reach(typingctx: Any, rate: Any, best: Any, table: Any, cost: Any, x: Any, w: Any) -> Any:
    """Step to `_LANES` neighbouring states: `cost[s] = best[s >> rate] + w (x - table[s])^2`.

    `best`, `table` and `cost` are the addresses of the first ones.
    """
    if not isinstance(rate, types.IntegerLiteral):
        return None
    bits = rate.literal_value
    places, numbers = (types.int64,) * 3, (types.float32,) * 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, best, table, cost, x, w = args
        states = ir.VectorType(ir.FloatType(), _LANES)

        def load(address: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

        def spread(vector: Any, sources: list[int]) -> Any:
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), sources)
            return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)

        def everywhere(number: Any) -> Any:
            one = ir.Constant(ir.VectorType(ir.FloatType(), 1), ir.Undefined)
            one = builder.insert_element(one, number, ir.IntType(32)(0))
            return spread(one, [0] * _LANES)

        count = max(1, _LANES >> bits)  # of states before: each leads to 2^rate neighbours
        before = load(best, ir.VectorType(ir.FloatType(), count))
        before = spread(before, [lane >> bits for lane in range(_LANES)])
        distance = builder.fsub(everywhere(x), load(table, states))
        added = builder.fmul(everywhere(w), builder.fmul(distance, distance))
        total = builder.fadd(before, added)
        builder.store(total, builder.inttoptr(cost, states.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(rate, *places, *numbers), codegen


@njit
def _least(cost):  # type: ignore[no-untyped-def]
    low = cost[0]
    for state in range(cost.size):
        low = lesser(low, cost[state])
    return low


@njit
def _walk_back(state, rate, came_from, n, entries):  # type: ignore[no-untyped-def]
    followers = came_from.shape[1]
    for t in range(n - 1, -1, -1):
        entries[t] = state
        state = np.int64(came_from[t, state >> rate]) * followers + (state >> rate)
