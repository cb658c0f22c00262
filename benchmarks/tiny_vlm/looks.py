"""Where answers are to be found, as rows of a batch know it (called by `conversations`).

The drawing code knows which box each answer is read from; here boxes become places of the picture's
merged patches in a row. What training makes of it is in `losses.look_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.tiny_vlm.patches import MERGE, PATCH
from benchmarks.tiny_vlm.pictures import QA, Array, Box


@dataclass(frozen=True)
class Look:
    """Where an answer is to be found: one drawn thing that one prediction should attend to."""

    hop: int
    """0: what must be found first; 1: what the answer is read from."""
    query: int
    """Place in the row whose prediction looks."""
    keys: tuple[int, ...]
    """Places of the picture's rows that show the thing."""
    weight: float
    """One over the number of things that this prediction looks at in this hop."""


def covered(box: Box, grid: tuple[int, int], first: int) -> tuple[int, ...]:
    """Places in a row of the merged patches that show most of a box; `first` is the picture's."""
    side = PATCH * MERGE
    shares = {}
    for r in range(grid[0]):
        high = min(box.bottom, (r + 1) * side) - max(box.top, r * side)
        for c in range(grid[1]):
            wide = min(box.right, (c + 1) * side) - max(box.left, c * side)
            shares[first + r * grid[1] + c] = max(0.0, high) * max(0.0, wide)
    most = max(shares.values())
    return tuple(place for place, share in shares.items() if share > 0 and share >= 0.4 * most)


def looks_of(item: QA, things: list[tuple[int, ...]], query: int, tokens: int) -> list[Look]:
    """Where the predictions of an answer of so many tokens should look; the first is at `query`."""
    looks = [Look(0, query, things[number], 1 / len(item.via)) for number in item.via]
    if item.is_spelled:
        start = query + tokens - len(item.at)
        looks += [Look(1, start + place, things[box], 1.0) for place, box in enumerate(item.at)]
    else:
        for place in range(query, query + tokens):
            looks += [Look(1, place, things[box], 1 / len(item.at)) for box in item.at]
    return [look for look in looks if look.keys]


class Looks(NamedTuple):
    """All `Look`s of a micro-batch."""

    where: Array
    """`[M, 3]` hop, row, query."""
    keys: Array
    """`[M, L]` whether a place of the row shows the thing."""
    weights: Array
    """`[M]`."""


def packed(rows: list[list[Look]], length: int) -> Looks:
    """The looks of rows of so many places."""
    looks = [(number, look) for number, row in enumerate(rows) for look in row]
    where = np.array([(look.hop, row, look.query) for row, look in looks], dtype=np.int64)
    keys = np.zeros((len(looks), length), dtype=bool)
    for number, (_, look) in enumerate(looks):
        keys[number, list(look.keys)] = True
    weights = np.array([look.weight for _, look in looks], dtype=np.float32)
    return Looks(where.reshape(-1, 3), keys, weights)
