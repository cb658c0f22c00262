"""Tables of 256 codewords on an int8 grid: training, assignment, refit (called by `solver`).

A block of `b` columns is the sum of its stages; a stage cuts the block into vectors of its own
dimension `d` and replaces each by one of 256 entries. Distances are measured in the block's own
metric `M` (`D_k` of the factorisation): that is what lets sensitive and insensitive channels share
a vector. Entries always live on `scale * int8`, during training too, so nothing is lost on disk.
Not here: the order of columns and the compensation between them (`rounding`).

Source: method memo D.1-D.3, B.7 (metric assignment), E.1 (reference distortions).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQWeight
from mgvq_kernels.trellis import windows

CODEBOOK_SIZE = 256
Tables = Sequence[Sequence[Tensor]]
"""[band][stage]: `[256, d]` float32."""
Names = Sequence[Sequence[str]]
"""[band][stage]: the name of a table."""
T = TypeVar("T")
_INT8_MAX = 127
_SEARCH_ELEMENTS = 1 << 22
"""Distances held at once while searching: 16 MiB of float32."""
SEED_VECTORS = 8192
"""Vectors among which the first codewords are drawn."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """One stage's table, as it is stored."""

    entries: Tensor
    """`[256, d]` int8."""
    scale: float
    """What an entry's unit is worth; exactly representable in float32."""

    @property
    def vector_dim(self) -> int:
        """Length of a codeword."""
        return self.entries.shape[1]

    @property
    def values(self) -> Tensor:
        """`[256, d]` float32: entries times scale."""
        return self.entries.float() * self.scale

    def drawn_out(self, factor: float) -> Codebook:
        """Return the table with every entry so many times as large."""
        return Codebook(self.entries, torch.tensor(self.scale * factor).item())


def vectors_of(matrix: Tensor, d: int) -> Tensor:
    """Return the vectors `[I/d, O, d]` of every `d` columns of a matrix `[O, I]`."""
    return matrix.view(matrix.shape[0], -1, d).transpose(0, 1).contiguous()


def snap(values: Tensor) -> Codebook:
    """Put a float table on the int8 grid that just holds its largest entry.

    Args:
        values: `[256, d]` float, finite.

    Returns:
        The nearest table on the grid.
    """
    largest = float(values.abs().max())
    scale = float(torch.tensor(largest / _INT8_MAX if largest > 0 else 1.0, dtype=torch.float32))
    entries = (values.double() / scale).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return Codebook(entries, scale)


def nearest(vectors: Tensor, table: Tensor, metrics: Tensor) -> Tensor:
    """Find the codeword nearest to each vector in its block's metric.

    Args:
        vectors: `[B, N, d]` float32.
        table: `[K, d]` float32.
        metrics: `[B, d, d]` float32, symmetric positive definite.

    Returns:
        `[B, N]` int64: `argmin_c (v - c)^T M (v - c)`.
    """
    projected = table @ metrics  # [B, K, d]
    norms = (projected * table).sum(-1)  # [B, K]
    if vectors.is_cpu and ops.has_numba():
        return compiled_search().nearest(vectors, projected, norms)
    B, N, _ = vectors.shape
    K = table.shape[0]
    codes = torch.empty(B, N, dtype=torch.int64, device=vectors.device)
    step = max(1, _SEARCH_ELEMENTS // (N * K))
    for start in range(0, B, step):
        part = slice(start, start + step)
        scores = torch.baddbmm(
            norms[part, None, :], vectors[part], projected[part].transpose(1, 2), alpha=-2
        )  # [b, N, K]
        codes[part] = scores.argmin(-1)
    return codes


def decode(codes: Sequence[Sequence[Tensor]], tables: Tables) -> Tensor:
    """Sum the stages of every band of a whole matrix.

    Args:
        codes: [band][stage] `[O, width/d]` integer.
        tables: [band][stage] `[256, d]` float32.

    Returns:
        `[O, I]` float32, without row scales.
    """
    O = codes[0][0].shape[0]  # noqa: E741
    bands = []
    for band_codes, band_tables in zip(codes, tables, strict=True):
        stages = [
            table.index_select(0, code.reshape(-1)).view(O, -1)
            for code, table in zip(band_codes, band_tables, strict=True)
        ]
        bands.append(stages[0] if len(stages) == 1 else torch.stack(stages).sum(0))
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)


def entries_of(weight: VQWeight) -> list[list[Tensor]]:
    """Return [band][stage] which entries a weight's codes name: `[O, width/d]` int32."""
    return [
        [
            (windows(codes, stage.rate, stage.window) if stage.codec == "trellis" else codes).int()
            for codes, stage in zip(per_stage, band.stages, strict=True)
        ]
        for per_stage, band in zip(weight.codes, weight.layout.bands, strict=True)
    ]


def train_codebook(
    vectors: Tensor, metrics: Tensor, iterations: int, generator: torch.Generator
) -> Codebook:
    """Train a table by expectation-maximisation in the blocks' metrics.

    Each update is the exact minimiser `c = (sum M_k)^-1 sum M_k v` of its cell, put on the int8
    grid; a codeword nobody uses restarts at one of the worst served vectors.

    Args:
        vectors: `[B, N, d]` float32, N vectors of each of B blocks of columns.
        metrics: `[B, d, d]` float32, symmetric positive definite.
        iterations: rounds of assignment and update.
        generator: seeds the first choice of codewords.

    Returns:
        The trained table.
    """
    book = snap(_spread(vectors, metrics, generator))
    for _ in range(iterations):
        codes = nearest(vectors, book.values, metrics)  # [B, N]
        book = snap(_cell_means(vectors, metrics, codes, book.values))
    return book


def refit_codebooks(
    weights: Sequence[Tensor],
    hessians: Sequence[Tensor],
    codes: Sequence[Sequence[Sequence[Tensor]]],
    names: Sequence[Names],
    tables: Mapping[str, Tensor],
    iterations: int = 25,
    outputs: Sequence[Tensor | None] | None = None,
    settled: float = 1e-6,
) -> dict[str, Tensor]:
    """Minimise `sum tr(B (W - Dec(C)) A (W - Dec(C))^T)` over the tables, codes fixed.

    Least squares, as `Dec` is linear: conjugate gradients with a diagonal preconditioner. Entries
    nobody uses stay as they are.

    Args:
        weights: one normalised `[O, I]` float32 a matrix.
        hessians: one `[I, I]` float32 a matrix.
        codes: for each matrix, [band][stage] `[O, width/d]` integer.
        names: for each matrix, [band][stage] the name of the table its codes point into.
        tables: `[256, d]` float32 by name: the starting point.
        iterations: conjugate gradient steps.
        outputs: one `B` `[O, O]` float32 a matrix; None stands for the identity.
        settled: where to stop, as a share of the first residual's energy; the int8 grid is coarser.

    Returns:
        The refitted tables, float32, not yet on the int8 grid.

    Source: method memo D.3; LNQ in GuidedQuant (arXiv 2505.07004), algorithm 2.
    """
    scatter = functools.partial(_scatter, codes, names, tables)
    outputs = outputs or [None] * len(hessians)
    images = functools.partial(_images, hessians, outputs)

    def decoded(values: Mapping[str, Tensor]) -> list[Tensor]:
        return [decode(c, named(n, values)) for c, n in zip(codes, names, strict=True)]

    diagonal = scatter(_diagonals(hessians, outputs, weights))
    inverse = {n: torch.where(x > 0, 1 / x, torch.zeros_like(x)) for n, x in diagonal.items()}
    residual = scatter(images([W - V for W, V in zip(weights, decoded(tables), strict=True)]))
    solution = {name: table.clone() for name, table in tables.items()}
    scaled = {name: inverse[name] * r for name, r in residual.items()}
    direction = {name: s.clone() for name, s in scaled.items()}
    energy = start = _dot(residual, scaled)
    for _ in range(iterations):
        if energy <= settled * start or energy == 0.0:
            break
        image = scatter(images(decoded(direction)))
        curvature = _dot(direction, image)
        if curvature <= 0.0:
            break
        step = energy / curvature
        for name in tables:
            solution[name].add_(direction[name], alpha=step)
            residual[name].sub_(image[name], alpha=step)
        scaled = {name: inverse[name] * r for name, r in residual.items()}
        energy, previous = _dot(residual, scaled), energy
        share = energy / previous
        direction = {name: scaled[name] + share * p for name, p in direction.items()}
    return solution


def _images(
    hessians: Sequence[Tensor], outputs: Sequence[Tensor | None], changes: Sequence[Tensor]
) -> list[Tensor]:
    """`B E A` of changes `[O, I]`, one a matrix."""
    products = [change @ A for change, A in zip(changes, hessians, strict=True)]
    return [P if B is None else B @ P for P, B in zip(products, outputs, strict=True)]


def _diagonals(
    hessians: Sequence[Tensor], outputs: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> list[Tensor]:
    """`B_rr A_ii` `[O, I]`, one a matrix."""
    return [
        A.diagonal() * (torch.ones_like(W) if B is None else B.diagonal()[:, None])
        for W, A, B in zip(weights, hessians, outputs, strict=True)
    ]


def named(names: Names, values: Mapping[str, T]) -> list[list[T]]:
    """Return [band][stage] what stands under the name of each table."""
    return [[values[name] for name in band] for band in names]


def _scatter(
    codes: Sequence[Sequence[Sequence[Tensor]]],
    names: Sequence[Names],
    tables: Mapping[str, Tensor],
    products: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Add every vector of `[O, I]` matrices to the entry its code names: the transpose of `Dec`."""
    sums = {name: torch.zeros_like(table) for name, table in tables.items()}
    for product, bands, labels in zip(products, codes, names, strict=True):
        start = 0
        for totals, stages in zip(named(labels, sums), bands, strict=True):
            width = stages[0].shape[1] * totals[0].shape[1]
            columns = product[:, start : start + width]
            start += width
            for total, code in zip(totals, stages, strict=True):
                total.index_add_(0, code.reshape(-1), columns.reshape(-1, total.shape[1]))
    return sums


def _cell_means(vectors: Tensor, metrics: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    """Return the metric mean of every cell `[256, d]`; empty cells restart at bad vectors."""
    B, N, d = vectors.shape
    cells = codes + CODEBOOK_SIZE * torch.arange(B, device=codes.device)[:, None]  # [B, N]
    counts = torch.bincount(cells.reshape(-1), minlength=B * CODEBOOK_SIZE)
    counts = counts.view(B, CODEBOOK_SIZE).double()
    moments = torch.einsum("bk,bij->kij", counts, metrics.double())  # [256, d, d]
    pulled = (vectors @ metrics).reshape(-1, d).double()
    sums = torch.zeros(CODEBOOK_SIZE, d, dtype=torch.float64, device=codes.device)
    sums.index_add_(0, codes.reshape(-1), pulled)
    used = counts.sum(0) > 0
    eye = torch.eye(d, dtype=torch.float64, device=codes.device)
    moments = torch.where(used[:, None, None], moments, eye)
    means = torch.linalg.solve(moments, sums[..., None])[..., 0].float()
    empty = (~used).nonzero()[:, 0]
    if len(empty):
        error = vectors - table[codes]  # [B, N, d]
        badness = ((error @ metrics) * error).sum(-1).reshape(-1)
        worst = badness.topk(min(len(empty), badness.numel())).indices
        means[empty] = table[empty]
        means[empty[: len(worst)]] = vectors.reshape(-1, d)[worst]
    return means


def _spread(vectors: Tensor, metrics: Tensor, generator: torch.Generator) -> Tensor:
    """Draw 256 vectors far from each other: k-means++ in the metrics, on a sample."""
    B, N, d = vectors.shape
    count = min(B * N, SEED_VECTORS)
    drawn = torch.randint(B * N, (count,), generator=generator).to(vectors.device)
    sample = vectors.reshape(-1, d)[drawn]  # [n, d]
    metric = metrics[drawn // N]  # [n, d, d]
    uniform = torch.rand(CODEBOOK_SIZE, generator=generator, dtype=torch.float64)
    image = (metric @ sample[..., None])[..., 0]  # [n, d]
    own = (image * sample).sum(-1)  # [n]
    # (s - c) M (s - c) is linear in c and c c^T: one product for all vectors.
    terms = torch.cat([-2 * image, metric.reshape(count, d * d)], dim=1)  # [n, d + d d]
    distance = own  # from the origin
    chosen = torch.empty(CODEBOOK_SIZE, d, device=vectors.device)
    for i in range(CODEBOOK_SIZE):
        cumulative = distance.double().cumsum(0)
        point = uniform[i].to(cumulative.device) * cumulative[-1]
        c = sample[torch.searchsorted(cumulative, point).clamp_max(count - 1)]
        chosen[i] = c
        now = (own + terms @ torch.cat([c, torch.outer(c, c).reshape(-1)])).clamp_min(0.0)
        distance = now if i == 0 else torch.minimum(distance, now)
    return chosen


@functools.cache
def compiled_search() -> Any:
    """Import the compiled search on first use: there may be no numba."""
    return importlib.import_module("mgvq_quantizer.cpu_search")


def _dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return sum(float((a.double() * right[name].double()).sum()) for name, a in left.items())
