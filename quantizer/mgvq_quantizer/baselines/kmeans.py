"""k-means where every coordinate of every vector has a weight, many tables at once.

For the baselines with codebooks. Our own `codebook` has 256 int8 entries and full metrics; the
published methods have any number of entries and diagonal weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_quantizer.codebook import compiled_search

_SEARCH_ELEMENTS = 1 << 17
"""Distances held at once: half a MiB stays in the cache, three times as fast as 64 MiB."""

_SEED_VECTORS = 16
"""Vectors an entry among which the first entries are drawn."""


def nearest(vectors: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """Find each vector's entry in its group's table.

    Args:
        vectors: `[G, N, d]` float32.
        weights: `[N, d]` float32, > 0: of the vectors of every group.
        tables: `[G, K, d]` float32.

    Returns:
        `[G, N]` int64: `argmin_k sum_j w_j (v_j - c_kj)^2`.
    """
    even = vectors.shape[2] % 2 == 0  # the compiled search takes its terms in fours
    if even and vectors.is_cpu and ops.has_numba():
        terms = torch.cat([weights * vectors, weights.expand_as(vectors)], -1)  # [G, N, 2d]
        forms = torch.cat([tables, -tables.square() / 2], -1)  # [G, K, 2d]
        return compiled_search().nearest(terms, forms, torch.zeros(tables.shape[:2]))
    G, N, _ = vectors.shape
    K = tables.shape[1]
    codes = torch.empty(G, N, dtype=torch.int64, device=vectors.device)
    step = max(1, _SEARCH_ELEMENTS // K)
    for g in range(G):
        table = tables[g]  # [K, d]
        for start in range(0, N, step):
            part = slice(start, start + step)
            scores = torch.addmm(
                weights[part] @ table.square().T,
                weights[part] * vectors[g, part],
                table.T,
                alpha=-2,
            )  # [n, K]
            codes[g, part] = scores.argmin(1)
    return codes


def train(
    vectors: Tensor, weights: Tensor, entries: int, iterations: int, generator: torch.Generator
) -> Tensor:
    """Train one table a group by expectation-maximisation.

    Tables start with k-means++; an entry that nobody uses stays where it is.

    Args:
        vectors: `[G, N, d]` float32.
        weights: `[N, d]` float32, > 0: of the vectors of every group.
        entries: of each table.
        iterations: rounds of assignment and update.
        generator: draws the first tables.

    Returns:
        `[G, entries, d]` float32.
    """
    G, N, d = vectors.shape
    tables = _spread(vectors, weights, entries, generator)
    first = entries * torch.arange(G, device=vectors.device)[:, None]
    mass = weights.expand(G, N, d).reshape(-1, d).double()
    pull = (weights * vectors).reshape(-1, d).double()
    for _ in range(iterations):
        cells = (nearest(vectors, weights, tables) + first).reshape(-1)  # [G*N]
        zeros = torch.zeros(G * entries, d, dtype=torch.float64, device=vectors.device)
        total = zeros.index_add(0, cells, mass)
        mean = zeros.index_add(0, cells, pull) / total
        flat = tables.view(-1, d)
        tables = torch.where(total > 0, mean.float(), flat).view(G, entries, d)
    return tables


def _spread(vectors: Tensor, weights: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Draw first entries `[G, entries, d]` far from each other: k-means++ on a sample."""
    G, N, d = vectors.shape
    size = min(N, _SEED_VECTORS * entries)
    drawn = torch.randperm(N, generator=generator)[:size].to(vectors.device)
    sample, weight = vectors[:, drawn], weights[drawn]  # [G, S, d], [S, d]
    uniform = torch.rand(entries, G, 1, generator=generator, dtype=torch.float64)
    uniform = uniform.to(vectors.device)
    distance = (weight * sample.square()).sum(-1)  # [G, S], from the origin
    chosen = torch.empty(G, entries, d, device=vectors.device)
    for i in range(entries):
        cumulative = distance.double().cumsum(1)
        index = torch.searchsorted(cumulative, uniform[i] * cumulative[:, -1:]).clamp_max(size - 1)
        chosen[:, i] = sample.gather(1, index[..., None].expand(-1, -1, d))[:, 0]
        now = (weight * (sample - chosen[:, i : i + 1]).square()).sum(-1)
        distance = now if i == 0 else torch.minimum(distance, now)
    return chosen
