"""The E8P codebook: 65,536 points near the origin of a shifted E8 lattice (for `quip`).

A point is one of 256 patterns of absolute values (halves of odd numbers), with signs whose last one
is implied by parity, moved by +1/4 or -1/4 in every coordinate: 8 + 7 + 1 bits for 8 weights. The
patterns are the 227 of squared norm at most 10 and 29 of norm 12. Searching goes by pattern, not by
point: for each pattern and shift the best signs are those of the target, but for one flip where
the parity asks for it.
A second codebook of the same lattice, 256 points, adds the third bit.

Source: QuIP# (arXiv 2402.04396), section 4.2 and appendix C. Which 29 patterns of norm 12 are taken
is not said there; ours are the first in lexical order.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

DIM = 8
PATTERNS = 256
SHIFT = 0.25
SCALE = 1.03
"""Points a unit of the weights' root mean square."""
_CHUNK = 1024
"""Vectors searched at once, so that their distances stay in the cache."""


@functools.cache
def patterns() -> Tensor:
    """Return the absolute values `[256, 8]` float32."""
    found = [
        pattern
        for pattern in itertools.product((0.5, 1.5, 2.5), repeat=DIM)
        if sum(x * x for x in pattern) <= 10
    ]
    norm_12 = [
        pattern
        for pattern in itertools.product((0.5, 1.5), repeat=DIM)
        if sum(x * x for x in pattern) == 12
    ]
    return torch.tensor([*found, *norm_12[: PATTERNS - len(found)]])


def nearest(vectors: Tensor) -> Tensor:
    """Return the codebook's nearest point to each vector.

    Args:
        vectors: `[N, 8]` float32, in the lattice's units.

    Returns:
        `[N, 8]` float32.
    """
    return torch.cat([_nearest(part) for part in torch.split(vectors, _CHUNK)])


def _nearest(vectors: Tensor) -> Tensor:
    table = patterns().to(vectors)
    odd = (table.sum(1) % 2).bool()  # [256]: patterns that need an odd number of minus signs
    norms = table.square().sum(1)
    best, least = torch.empty_like(vectors), torch.full_like(vectors[:, 0], float("inf"))
    for shift in (SHIFT, -SHIFT):
        target = vectors - shift
        size = target.abs()
        is_odd = ((target < 0).sum(1) % 2).bool()
        must_flip = is_odd[:, None] != odd  # [N, 256]
        cheapest = size[:, :1] * table[:, 0]  # [N, 256]: a quarter of what a flip costs
        for i in range(1, DIM):
            torch.minimum(cheapest, size[:, i : i + 1] * table[:, i], out=cheapest)
        distance = norms - 2 * size @ table.T + torch.where(must_flip, 4 * cheapest, 0.0)
        distance, pattern = (distance + target.square().sum(1, keepdim=True)).min(1)
        chosen = table[pattern]  # [N, 8]
        signs = torch.where(target < 0, -1.0, 1.0)
        place = (size * chosen).argmin(1, keepdim=True)
        flip = torch.where(must_flip.gather(1, pattern[:, None]), -1.0, 1.0)
        signs.scatter_(1, place, flip * signs.gather(1, place))
        points = signs * chosen + shift
        better = distance < least
        best = torch.where(better[:, None], points, best)
        least = torch.where(better, distance, least)
    return best


def one_bit_points() -> Tensor:
    """Return 256 points `[256, 8]` of E8: the origin, the 240 of norm 2 and 15 of norm 4."""
    whole = itertools.product((-1.0, 0.0, 1.0), repeat=DIM)
    halves = itertools.product((-0.5, 0.5), repeat=DIM)
    points = [p for p in (*whole, *halves) if sum(p) % 2 == 0]
    roots = [p for p in points if sum(x * x for x in p) == 2]
    axes = [
        tuple(sign * 2.0 * (i == j) for j in range(DIM)) for sign in (1, -1) for i in range(DIM)
    ]
    return torch.tensor([(0.0,) * DIM, *roots, *axes[: PATTERNS - 1 - len(roots)]])
