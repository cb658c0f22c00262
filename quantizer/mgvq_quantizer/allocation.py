"""Which matrices are quantized, at how many bits, and who shares tables (called by `pipeline`).

This release gives one rate to each group of matrices (decoder, embedding, vision) and one band to
each matrix. Mixed rates chosen by sensitivity will replace `plan`, nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mgvq_kernels.layout import VQLayout
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec


@dataclass(frozen=True)
class MatrixPlan:
    """What is to be done with one matrix."""

    name: str
    """The module's name, as in the checkpoint."""
    layout: VQLayout
    shared: tuple[tuple[str, ...], ...] | None
    """[band][stage]: names of the tables it shares with its kind; None gives it its own."""

    @property
    def spec(self) -> MatrixSpec:
        """The matrix as the checkpoint describes it."""
        return MatrixSpec(self.layout, self.shared or ())


def plan(model: nn.Module, recipe: QuantRecipe) -> dict[str, MatrixPlan]:
    """Choose rate and layout of every matrix of a dense model.

    A matrix whose width is no multiple of 8 stays dense. A matrix shares its tables with the same
    matrix of other layers when tables of its own would cost more than the recipe allows.

    Args:
        model: a model of `mgvq_runtime.models`, dense.
        recipe: rates and limits.

    Returns:
        The plans by module name, in the model's order.
    """
    shapes = {
        name: (int(module.weight.shape[0]), int(module.weight.shape[1]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0
    }
    siblings = Counter((kind_of(name), shape) for name, shape in shapes.items())
    plans = {}
    for name, (rows, columns) in shapes.items():
        rate = recipe.rate_of(group_of(name))
        layout = VQLayout.uniform(rows, columns, rate, has_permutation=recipe.permute)
        overhead = layout.codebook_bits() / layout.num_weights
        shared = None
        if overhead > recipe.max_codebook_overhead and siblings[kind_of(name), (rows, columns)] > 1:
            label = f"{kind_of(name)}-{rows}x{columns}-{rate}bit"
            shared = (tuple(f"{label}-{s}" for s in range(len(layout.bands[0].stages))),)
        plans[name] = MatrixPlan(name, layout, shared)
    return plans


def sharing_groups(plans: Mapping[str, MatrixPlan]) -> dict[str, Sequence[MatrixPlan]]:
    """Return the plans that share tables, by the name of their first table."""
    groups: dict[str, list[MatrixPlan]] = {}
    for matrix in plans.values():
        if matrix.shared is not None:
            groups.setdefault(matrix.shared[0][0], []).append(matrix)
    return dict(groups)


def kind_of(name: str) -> str:
    """Return a module's name without layer numbers, fit for a table's name."""
    return re.sub(r"\.\d+(?=\.)", "", name).replace(".", "-")
