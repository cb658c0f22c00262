"""Entries of trellis-coded blocks (called by `codebook.assign` and `rounding.sweep`).

A weight's entry is named by a window of the code stream that ends with the weight's own new bits,
so neighbours share bits, and the best codes of a whole segment of rows are found together: the
Viterbi algorithm over the states a window can be in. Errors are weighted by the diagonal of the
block's metric; what its channels make up for of each other is left to the feedback between blocks
(on 12 matrices of SmolLM2 blocks of 4, 8 and 16 channels lost alike, within a tenth). The stream of
a segment is circular: a first, shorter search over the place where it closes fixes the state there.
Not here: the compiled search (`cpu_trellis`), the order of bits on disk (`mgvq_kernels.trellis`).

Source: QTIP (arXiv 2406.11235), sections 3 and 4; method memo E.3.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_kernels.trellis import segments
from mgvq_quantizer.codebook import Codebook, snap

CLOSING = 96
"""Weights on each side of the place where a stream closes that fix the state there."""


def first_table(rate: int, window: int, generator: torch.Generator) -> Codebook:
    """Return the table a refit starts from: the quantiles of a normal distribution, shuffled.

    What follows a state must look like a random draw, which is what shuffling gives.

    Args:
        rate: bits a weight.
        window: bits that name an entry.
        generator: shuffles.

    Returns:
        `2^window` entries of one weight, of variance `1 - 4^-rate`: what a code of that rate
        reproduces of a variance of one.
    """
    size = 1 << window
    normal = NormalDist(0.0, (1 - 4.0**-rate) ** 0.5)
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / size) for i in range(size)])
    return snap(quantiles[torch.randperm(size, generator=generator)][:, None])


def trellis_rates(layout: VQLayout) -> list[int]:
    """Return [band] the bits a weight of a trellis, 0 where codes are lookups."""
    return [band.rate if layout.codec == "trellis" else 0 for band in layout.bands]


def encode(goal: Tensor, weights: Tensor, table: Tensor, rate: int) -> Tensor:
    """Choose the entries of one block of columns, segment by segment.

    Args:
        goal: `[O, 8]` float32.
        weights: `[8]` float32, positive: what a squared error costs in each column.
        table: `[2^window, 1]` float32.
        rate: bits a weight.

    Returns:
        `[O, 8]` int64: entries whose windows follow each other as the format says.
    """
    weights = weights / weights.mean()
    parts = segments(goal.shape[0])
    if ops.has_numba():
        found = _compiled().encode(goal.cpu(), weights.cpu(), table.cpu(), rate, parts)
        return found.to(goal.device)
    return torch.cat([_viterbi(goal[a:b], weights, table[:, 0], rate) for a, b in parts])


def assign_trellis(
    targets: Tensor, metric: Tensor, tables: Sequence[Tensor], rate: int
) -> tuple[list[Tensor], Tensor]:
    """Choose the entries of one block of columns for all rows: `codebook.assign` for a trellis.

    Args:
        targets: `[O, 8]` float32.
        metric: `[8, 8]` float32, symmetric positive definite; its diagonal is used.
        tables: the one table `[2^window, 1]` float32 of its band.
        rate: bits a weight.

    Returns:
        The entries, one `[O, 8]` int64, and the block's value `[O, 8]`.
    """
    (table,) = tables
    entries = encode(targets, metric.diagonal(), table, rate)
    return [entries], table[:, 0][entries]


def whole_segments(values: Tensor) -> Tensor:
    """Give every row the sum `[O]` of its segment, whose codes change together or not at all."""
    return torch.cat([values[a:b].sum().expand(b - a) for a, b in segments(len(values))])


def _viterbi(goal: Tensor, weights: Tensor, table: Tensor, rate: int) -> Tensor:
    """Search one segment `[rows, 8]`; `cpu_trellis` does the same in compiled code."""
    stream, costs = goal.reshape(-1), weights.repeat(len(goal))  # [n]
    n, followers = len(stream), len(table) >> rate
    near = min(n, CLOSING)
    around = torch.cat([torch.arange(n - near, n), torch.arange(near)]).to(stream.device)
    open_ends = torch.zeros(len(table), device=stream.device)
    closing = _search(stream[around], costs[around], table, rate, open_ends, None)
    state = int(closing[near - 1]) % followers
    start = torch.full_like(open_ends, torch.inf)
    start.view(-1, followers)[:, state] = 0.0
    return _search(stream, costs, table, rate, start, state).view_as(goal)


def _search(
    stream: Tensor, costs: Tensor, table: Tensor, rate: int, start: Tensor, end: int | None
) -> Tensor:
    """Return the entries `[n]` of least cost, from states at the costs `start` to an `end`."""
    branches, followers = 1 << rate, len(table) >> rate
    cost, came_from = start, []
    for x, w in zip(stream, costs, strict=True):
        best, arg = cost.view(branches, followers).min(0)  # [followers]
        came_from.append(arg)
        cost = best.repeat_interleave(branches) + w * (x - table) ** 2  # [2^window]
    if end is None:
        state = int(cost.argmin())
    else:
        state = int(cost.view(branches, followers)[:, end].argmin()) * followers + end
    entries = []
    for arg in reversed(came_from):
        entries.append(state)
        state = int(arg[state >> rate]) * followers + (state >> rate)
    return torch.tensor(entries[::-1], device=stream.device)


@functools.cache
def _compiled() -> Any:
    """Import the compiled search on first use: there may be no numba."""
    return importlib.import_module("mgvq_quantizer.cpu_trellis")
