"""How a run will lay every matrix out, before anything is measured (for `forecast`, `preflight`).

Bands follow supposed losses, rows of a token table supposed uses: what they cost is what was asked
for, and a budget that cannot be met is found out at once. Not here: the real bands (`planning`).
"""

from __future__ import annotations

from mgvq_quantizer.allocation import MatrixPlan, plan
from mgvq_quantizer.precision import choose_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity, run_widths
from mgvq_quantizer.table_parts import assumed_use, split_tables
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.models.causal_lm import CausalLM

_UNEVENNESS = 20.0
"""Losses of a matrix's runs of channels differ up to so many times on the demonstration model."""
_LOSS_A_BIT = 0.25
"""What one more bit leaves of a loss, at high rates."""


def expected_plans(graph: CausalLM, recipe: QuantRecipe) -> dict[str, MatrixPlan]:
    """Lay out every matrix as a run would, on losses that are supposed; cut tables into parts.

    Args:
        graph: dense, on any device; the modules of its tables may be replaced.
        recipe: settings.

    Raises:
        ConfigError: if the budget cannot be met.
    """
    tables = split_tables(graph, assumed_use(graph), recipe) if recipe.has_row_parts else {}
    plans = plan(graph, recipe, tables)
    if recipe.allocation == "uniform":
        return plans
    supposed = [_supposed(p, recipe) for name, p in plans.items() if group_of(name) == "decoder"]
    return plan(graph, recipe, {**tables, **choose_bands(supposed, plans, recipe)})


def _supposed(matrix: MatrixPlan, recipe: QuantRecipe) -> Sensitivity:
    """Losses that fall by equal shares from the first run of channels to the last."""
    widths = run_widths(matrix.layout.in_features)
    last = max(1, len(widths) - 1)
    shares = [width * _UNEVENNESS ** (-i / last) for i, width in enumerate(widths)]
    losses = tuple(tuple(s * _LOSS_A_BIT**rate for rate in recipe.rates) for s in shares)
    nothing = (0.0,) * len(widths)
    return Sensitivity(matrix.name, recipe.rates, widths, losses, 0.0, nothing)
