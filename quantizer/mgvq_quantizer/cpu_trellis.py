# mypy: disable-error-code="untyped-decorator"
"""The Viterbi search of `trellis_search` in compiled code (called by it alone, with numba).

Costs are float32 and positive, so their bits order as they do: the lowest bits of a cost carry
which predecessor it came from, and one integer minimum finds both (1.2 to 1.5 us a weight for a
window of 12 bits at 1 to 3 bits, 2.9 at 4 bits, on one AVX2 core; a float comparison with a
separate index takes 13 to 19). Segments are cut over as many threads as torch may use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import int32, njit, uint8  # noqa: TID253 (this file is made of it)
from torch import Tensor

from mgvq_kernels.cpu_jit import compile_cached
from mgvq_kernels.cpu_threads import over_threads
from mgvq_quantizer.trellis_search import CLOSING

_RELEASE = 16
"""Steps after which the least cost is taken off all, so that they stay small."""
_UNREACHABLE = 1e30
_UNROLLED = 16
"""Predecessors a loop compares at a time: the compiler does not unroll one over 32, which took 4.2
us a weight where two over 16 take 0.3."""
_MINIMUM_IN_ANY_ORDER = {"nnan", "nsz"}


def encode(
    goal: Tensor, weights: Tensor, table: Tensor, rate: int, parts: Sequence[tuple[int, int]]
) -> Tensor:
    """Choose the entries `[O, 8]` of one block of columns; arguments as in `trellis_search`."""
    size = len(table)
    rows = torch.tensor(parts)
    entries = torch.empty(goal.shape, dtype=torch.int64)
    # By the symbol that leads to a state, then by the state before it: both inner loops run along.
    by_symbol = table.reshape(size >> rate, 1 << rate).T.contiguous()
    arrays = tuple(x.contiguous().numpy() for x in (goal, weights, by_symbol, rows))
    over_threads(lambda i, j: _coder(rate)(*arrays, entries.numpy(), i, j), 0, len(parts), 1, True)
    return entries


@functools.cache
def _coder(rate: int) -> Any:
    """Compile the search of one rate."""
    forward = _forward(rate)

    @compile_cached
    def encode(goal, weights, table, rows, entries, first, last):  # type: ignore[no-untyped-def]
        symbols, followers = table.shape
        cost, best = np.empty(symbols * followers, np.float32), np.empty(followers, np.float32)
        for s in range(first, last):
            stream = goal[rows[s, 0] : rows[s, 1]].copy().reshape(-1)
            n = stream.size
            w = np.empty(n, np.float32)
            for t in range(n):
                w[t] = weights[t % weights.size]
            near = min(n, CLOSING)
            came_from = np.empty((max(n, 2 * near), followers), np.uint8)
            found = np.empty(max(n, 2 * near), np.int64)
            around = np.concatenate((stream[n - near :], stream[:near]))
            w_around = np.concatenate((w[n - near :], w[:near]))
            cost[:] = 0.0
            forward(around, w_around, table, cost, best, came_from)
            _walk_back(np.argmin(cost), rate, came_from, 2 * near, found)
            closing = found[near - 1] % followers
            cost[:] = _UNREACHABLE
            cost[closing::followers] = 0.0
            forward(stream, w, table, cost, best, came_from)
            end = np.argmin(cost[closing::followers]) * followers + closing
            _walk_back(end, rate, came_from, n, found)
            entries[rows[s, 0] : rows[s, 1]] = found[:n].reshape(-1, goal.shape[1])

    return encode


def _forward(rate: int) -> Any:
    """Make the pass over a stream; its loops over the symbols of one rate are unrolled."""
    survive, branch = _survive(rate), _branch(rate)

    @njit
    def forward(stream, weights, table, cost, best, came_from):  # type: ignore[no-untyped-def]
        cost_bits, best_bits = cost.view(np.int32), best.view(np.int32)
        for t in range(stream.size):
            survive(cost_bits, best_bits, came_from[t])
            branch(best, table, stream[t], weights[t], cost)
            if t % _RELEASE == _RELEASE - 1:
                cost -= cost.min()

    return forward


def _survive(rate: int) -> Any:
    """Make the choice of the best state before each state's lowest bits."""
    symbols = 1 << rate
    few = min(symbols, _UNROLLED)
    keep, mask = np.int32(-symbols), np.int32(symbols - 1)

    @njit(fastmath=_MINIMUM_IN_ANY_ORDER)
    def survive(cost, best, came_from):  # type: ignore[no-untyped-def]
        followers = best.size
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

    return survive


def _branch(rate: int) -> Any:
    """Make the step to all states that follow."""
    symbols = 1 << rate

    @njit(fastmath=_MINIMUM_IN_ANY_ORDER)
    def branch(best, table, x, w, cost):  # type: ignore[no-untyped-def]
        for h in range(best.size):
            for i in range(symbols):
                distance = x - table[i, h]
                cost[symbols * h + i] = best[h] + w * (distance * distance)

    return branch


@njit
def _walk_back(state, rate, came_from, n, entries):  # type: ignore[no-untyped-def]
    followers = came_from.shape[1]
    for t in range(n - 1, -1, -1):
        entries[t] = state
        state = np.int64(came_from[t, state >> rate]) * followers + (state >> rate)
