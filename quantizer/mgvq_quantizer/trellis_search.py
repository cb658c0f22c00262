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
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_kernels.trellis import segments
from mgvq_quantizer.codebook import Codebook, Tables, snap

CLOSING = 96
"""Weights on each side of the place where a stream closes that fix the state there."""
TAILS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""How far the scales of a table's values spread, in natural logarithms: from a normal distribution
to a kurtosis of 8. Bands of the loudest channels in SmolLM2 have one of 3.8 to 18.5."""
COMMON_TAIL = 2
"""The place in `TAILS` of most matrices of SmolLM2: what serves all of them if one must."""
SCALE_STEPS = 17
"""Quarters of an octave: up to 16 times a row's root mean square."""
_SPREADING = 0.8
"""Entries lie as dense as values do to this power. On 16 matrices of SmolLM2 the layer error of 1
and 2 bits was .962 and .901 of a normal table's with a power of 1, .906 and .844 with .8, .899 and
.845 with .7, which costs near-normal matrices 2 %."""


def first_table(rate: int, window: int, tail: int, generator: torch.Generator) -> Codebook:
    """Return the table a refit starts from: of normal values with scales of their own, shuffled.

    What follows a state must look like a random draw, which is what shuffling gives.

    Args:
        rate: bits a weight.
        window: bits that name an entry.
        tail: a place in `TAILS`.
        generator: shuffles.

    Returns:
        `2^window` entries of one weight for values of variance one, drawn in by
        `(1 - 4^-rate)^0.5`: what a code of that rate reproduces of them.
    """
    entries = _quantiles(window, tail) * (1 - 4.0**-rate) ** 0.5
    return snap(entries[torch.randperm(len(entries), generator=generator)][:, None])


@functools.cache
def _quantiles(window: int, tail: int) -> Tensor:
    """`[2^window]` float32: where the entries of `first_table` lie at variance one."""
    half = 1 << (window - 1)
    x = torch.arange(0.0, 60.0, 0.002, dtype=torch.float64)
    density = torch.zeros_like(x)
    for step in range(-40, 41):  # the scales' own normal distribution, to four deviations
        g = step / 10
        scale = math.exp(TAILS[tail] * (g - TAILS[tail]))
        density += math.exp(-g * g / 2) / scale * torch.exp(-((x / scale) ** 2) / 2)
    mass = (density**_SPREADING).cumsum(0)
    places = (torch.arange(half, dtype=torch.float64) + 0.5) / half
    positive = x[torch.searchsorted(mass, places * mass[-1])].float()
    return torch.cat([-positive, positive])


def tail_of(weight: Tensor, moments: Tensor) -> int:
    """Return the place in `TAILS` of the table that fits columns of a matrix.

    A normal value times a scale with a spread of `t` has a kurtosis of `3 exp(4 t^2)`. Columns
    count by the square root of their moments: that kurtosis names the best spread (of .2 to .65)
    to within .1 for 26 of 28 matrices of SmolLM2, at 2 and at 3 bits.

    Args:
        weight: `[O, I]` rows divided by their scales.
        moments: `[I]`: the second moments of the inputs.
    """
    counted = moments.double().clamp_min(0).sqrt()
    squares = weight.square()
    second = squares.mean(0).double() @ counted
    fourth = squares.square_().mean(0).double() @ counted
    kurtosis = fourth * counted.sum() / second.square().clamp_min(1e-30)
    spread = math.sqrt(math.log(max(float(kurtosis) / 3, 1.0)) / 4)
    return min(range(len(TAILS)), key=lambda place: abs(TAILS[place] - spread))


def tails_of(
    weight: Tensor, moment: Tensor, order: Tensor | None, layout: VQLayout
) -> tuple[int, ...]:
    """Return `tail_of` every band.

    Args:
        weight: `[O, I]` in the model's order.
        moment: `[I, I]` of the inputs.
        order: `[I]` int64: the original channel at each place; None for the model's.
        layout: the bands.
    """
    normal = weight / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    moments = moment.diagonal()
    if order is not None:
        normal, moments = normal[:, order], moments[order]
    widths = [band.width for band in layout.bands]
    parts = zip(torch.split(normal, widths, dim=1), torch.split(moments, widths), strict=True)
    return tuple(tail_of(*part) for part in parts)


def reaching_scales(
    weight: Tensor,
    scales: Tensor,
    metrics: Sequence[Tensor],
    tables: Tables,
    rates: Sequence[int],
) -> Tensor:
    """Raise the scales of rows whose largest weights a table would cut off at too high a cost.

    One weight of 28 deviations on the channel of SmolLM2's massive activations (down_proj of block
    28) made 95 % of that layer's error until its row's scale was large enough.

    Args:
        weight: `[O, I]` in permuted channels.
        scales: `[O]` float32: the rows' root mean squares.
        metrics: `[width/b, b, b]` a band: what an error costs; the diagonals are used.
        tables: [band][stage].
        rates: [band]; 0 leaves lookups, whose tables are trained, as they are.

    Returns:
        `[O]` float32, every value a float16.
    """
    if not any(rates):
        return scales
    costs = torch.cat([m.diagonal(dim1=1, dim2=2).flatten() for m in metrics])  # [I]
    widths = [m.shape[0] * m.shape[1] for m in metrics]
    reach = torch.cat(
        [b[0].abs().max().expand(n) for b, n in zip(tables, widths, strict=True)]
    )  # [I]
    left = sum(4.0**-r * c.sum() for r, c in zip(rates, torch.split(costs, widths), strict=True))
    best, least, size = scales, torch.full_like(scales, torch.inf), weight.abs()
    for step in range(SCALE_STEPS):
        tried = scales * 2 ** (step / 4)
        cut = (size - tried[:, None] * reach).clamp_min_(0)  # [O, I]
        loss = cut.square_() @ costs + tried.square() * left
        best, least = torch.where(loss < least, tried, best), torch.minimum(loss, least)
    return best.half().float()


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
