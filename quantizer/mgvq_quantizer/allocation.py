"""How each matrix is cut into bands of rates, and who shares tables (called by `pipeline`).

The widths of the bands come from `sensitivity`, or every group of matrices has one rate. Not here:
which widths are best (`budget`), what a rate costs in quality (`sensitivity`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mgvq_kernels.layout import RATE_STAGES, Band, Stage, VQLayout
from mgvq_quantizer.codebook import Names
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec

Widths = Mapping[int, int]
"""Channels of a matrix by the rate they get; rates without channels may be left out."""


@dataclass(frozen=True)
class MatrixPlan:
    """What is to be done with one matrix."""

    name: str
    """The module's name, as in the checkpoint."""
    layout: VQLayout
    tables: Names
    """[band][stage]: the name of the table its codes point into."""
    shared: bool
    """Whether other matrices read the tables too."""

    @property
    def spec(self) -> MatrixSpec:
        """The matrix as the checkpoint describes it."""
        names = tuple(tuple(band) for band in self.tables) if self.shared else ()
        return MatrixSpec(self.layout, names)


def plan(
    model: nn.Module, recipe: QuantRecipe, widths: Mapping[str, Widths] | None = None
) -> dict[str, MatrixPlan]:
    """Lay out every matrix of a dense model.

    A matrix whose width is no multiple of 8 stays dense. A matrix shares its tables with the same
    matrix of other layers when tables of its own would cost more than the recipe allows.

    Args:
        model: a model of `mgvq_runtime.models`, dense.
        recipe: rates and limits.
        widths: bands of the matrices that have several rates, by module name.

    Returns:
        The plans by module name, in the model's order.
    """
    shapes = matrix_shapes(model)
    siblings = Counter((kind_of(name), shape) for name, shape in shapes.items())
    plans = {}
    for name, (rows, columns) in shapes.items():
        mine = (widths or {}).get(name) or {recipe.rate_of(group_of(name)): columns}
        has_siblings = siblings[kind_of(name), (rows, columns)] > 1
        plans[name] = plan_matrix(name, rows, mine, recipe, has_siblings)
    return plans


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return `(O, I)` of every matrix that can be quantized, by module name."""
    return {
        name: (int(module.weight.shape[0]), int(module.weight.shape[1]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0
    }


def plan_matrix(
    name: str, rows: int, widths: Widths, recipe: QuantRecipe, has_siblings: bool
) -> MatrixPlan:
    """Lay out one matrix: a band for each rate, the lowest first."""
    bands, rates, start = [], [], 0
    for rate in sorted(rate for rate, width in widths.items() if width):
        bands.append(Band(start, widths[rate], tuple(map(Stage, RATE_STAGES[rate]))))
        rates.append(rate)
        start += widths[rate]
    layout = VQLayout(rows, start, tuple(bands), has_permutation=recipe.permute)
    overhead = layout.codebook_bits() / layout.num_weights
    shared = has_siblings and overhead > recipe.max_codebook_overhead
    label = f"{kind_of(name)}-{rows}x{start}" if shared else name
    tables = tuple(
        tuple(f"{label}-{rate}bit-{s}" for s in range(len(band.stages)))
        for band, rate in zip(bands, rates, strict=True)
    )
    return MatrixPlan(name, layout, tables, shared)


def sharing_groups(plans: Mapping[str, MatrixPlan]) -> dict[str, Sequence[MatrixPlan]]:
    """Return the plans that share tables, by kind and shape."""
    groups: dict[str, list[MatrixPlan]] = {}
    for name, matrix in plans.items():
        if matrix.shared:
            layout = matrix.layout
            label = f"{kind_of(name)}-{layout.out_features}x{layout.in_features}"
            groups.setdefault(label, []).append(matrix)
    return dict(groups)


def kind_of(name: str) -> str:
    """Return a module's name without layer numbers, fit for a table's name."""
    return re.sub(r"\.\d+(?=\.)", "", name).replace(".", "-")
