"""Which option every item gets under one budget of bits (called by `sensitivity`; pure arithmetic).

An item is a run of channels, an option a rate: what it costs in bits and what it loses in quality.
Greedy by gain a bit along each item's lower convex hull, which is optimal but for the last items;
those, the ones nearest to breaking even, are then chosen again exactly, together, by dynamic
programming. A problem of at most `CORE` items is thus solved exactly.

Source: method memo B.6; the core of a knapsack, Pisinger 1995 (multiple choice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mgvq_runtime.errors import ConfigError

CORE = 48
"""Items that are chosen exactly at the end."""


@dataclass(frozen=True)
class Item:
    """What the options of one item cost."""

    bits: tuple[int, ...]
    """Rising."""
    losses: tuple[float, ...]
    """One an option, finite."""


def allocate(items: Sequence[Item], budget: int) -> list[int]:
    """Choose one option an item so that the losses sum to the least within a budget.

    Args:
        items: at least one option each.
        budget: the most bits all chosen options may cost together.

    Returns:
        The index of the chosen option of each item.

    Raises:
        ConfigError: if even the cheapest options cost more.
    """
    spent = sum(item.bits[0] for item in items)
    if spent > budget:
        raise ConfigError(
            f"the least these matrices can take is {spent} bits, allowed are {budget}"
        )
    chosen = [0] * len(items)
    steps = sorted(step for i, item in enumerate(items) for step in _steps(i, item))
    break_even = 0.0
    for ratio, i, option in steps:
        cost = items[i].bits[option] - items[i].bits[chosen[i]]
        if spent + cost > budget:
            break_even = ratio
            break
        chosen[i], spent = option, spent + cost
    nearest: dict[int, None] = {}
    for _, i, _ in sorted(steps, key=lambda step: abs(step[0] - break_even)):
        nearest[i] = None
    core = [*nearest, *(i for i in range(len(items)) if i not in nearest)][:CORE]
    room = budget - spent + sum(items[i].bits[chosen[i]] for i in core)
    for i, option in zip(core, _exactly([items[i] for i in core], room), strict=True):
        chosen[i] = option
    return chosen


def _steps(number: int, item: Item) -> list[tuple[float, int, int]]:
    """`(minus the gain a bit, item, option)` along the lower hull, the largest gain first."""
    hull: list[int] = []
    for option in range(len(item.bits)):
        if hull and item.losses[option] >= item.losses[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(item, hull[-2], hull[-1]) <= _gain(item, hull[-1], option):
            hull.pop()
        hull.append(option)
    return [(-_gain(item, low, high), number, high) for low, high in pairwise(hull)]


def _gain(item: Item, low: int, high: int) -> float:
    return (item.losses[low] - item.losses[high]) / (item.bits[high] - item.bits[low])


def _exactly(items: Sequence[Item], room: int) -> list[int]:
    """Solve a small problem by dynamic programming over the bits above the cheapest options."""
    extra = [[bits - item.bits[0] for bits in item.bits] for item in items]
    unit = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    most = sum(max(costs) for costs in extra)
    slots = min(room - sum(item.bits[0] for item in items), most) // unit + 1
    best = np.zeros(slots)  # the least loss within so many units
    picks = []
    for item, costs in zip(items, extra, strict=True):
        table = np.full((len(costs), slots), np.inf)
        for option, cost in enumerate(costs):
            start = cost // unit
            if start < slots:
                table[option, start:] = best[: slots - start] + item.losses[option]
        picks.append(table.argmin(0))
        best = table.min(0)
    options, slot = [], slots - 1
    for costs, pick in zip(reversed(extra), reversed(picks), strict=True):
        options.append(int(pick[slot]))
        slot -= costs[options[-1]] // unit
    return options[::-1]
