"""The tables that a rounding starts from, trained on all bands that read them (called by `solver`).

Lookups: one table a stage, by k-means in the metric of the rounding, on a sample of rows; later
stages on what the earlier ones left. A trellis: normal values with the tails of what it will read.
Not here: the training itself (`codebook`), which bands share a table (`solver`).

Source: method memo D.1, D.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_kernels.layout import Stage
from mgvq_quantizer.codebook import Codebook, nearest, train_codebook, vectors_of
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.trellis_search import first_table, tail_of

MAX_TRAINING_VECTORS = 1 << 17


@dataclass(frozen=True, eq=False)
class Piece:
    """One band of one matrix."""

    stages: tuple[Stage, ...]
    target: Tensor
    """`[O, w]` float32: rows divided by their scales."""
    moments: Tensor
    """`[w]`: second moments of its inputs."""
    metrics: Tensor
    """`[w/b, b, b]`: of its blocks."""
    importance: float
    """What a unit of its metric counts beside the other pieces."""


def first_tables(
    pieces: Sequence[Piece], recipe: QuantRecipe, generator: torch.Generator
) -> list[Codebook]:
    """Make the tables of bands that share them.

    Args:
        pieces: at least one; of the same stages and rows.
        recipe: rounds of training.
        generator: draws rows and first entries, or a trellis's values.

    Returns:
        One table a stage.
    """
    stages = pieces[0].stages
    if stages[0].codec == "trellis":
        parts = torch.cat([piece.target for piece in pieces], dim=1)
        tail = tail_of(parts, torch.cat([piece.moments for piece in pieces]))
        return [first_table(stages[0].rate, stages[0].window, tail, generator)]
    dims = [stage.vector_dim for stage in stages]
    widths = [piece.target.shape[1] for piece in pieces]
    some = max(1, MAX_TRAINING_VECTORS * min(dims) // sum(widths))
    rows = torch.randperm(len(pieces[0].target), generator=generator)[:some]
    left = [piece.target[rows.to(piece.target.device)] for piece in pieces]
    books: list[Codebook] = []
    for d in dims:
        metrics = torch.cat([_metrics(piece.metrics, d) * piece.importance for piece in pieces])
        vectors = torch.cat([vectors_of(part, d) for part in left])
        book = train_codebook(vectors, metrics, recipe.codebook_iterations, generator)
        codes = nearest(vectors, book.values, metrics)
        values = torch.split(book.values[codes], [width // d for width in widths])
        left = [
            part - v.transpose(0, 1).reshape(part.shape)
            for part, v in zip(left, values, strict=True)
        ]
        books.append(book)
    return books


def _metrics(metrics: Tensor, d: int) -> Tensor:
    """Return the diagonal blocks `[w/d, d, d]` of the metrics `[w/b, b, b]` of longer vectors."""
    nb, b, _ = metrics.shape
    blocks = metrics.view(nb, b // d, d, b // d, d)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, d, d)
