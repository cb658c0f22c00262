"""From what channels lose at each rate to bands under a budget (called by `pipeline`).

The budget counts everything a checkpoint stores for the decoder's matrices: codes, tables, row
scales and the order of channels. Not here: the search (`budget`), the layouts (`allocation`).

Source: method memo B.6.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mgvq_quantizer.allocation import MatrixPlan, Widths, table_bits
from mgvq_quantizer.budget import Item, allocate
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity

_SCALE_BITS = 16
_ORDER_BITS = 32


def choose_widths(
    sensitivities: Sequence[Sensitivity],
    plans: Mapping[str, MatrixPlan],
    recipe: QuantRecipe,
) -> dict[str, Widths]:
    """Give every run of channels a rate, so that the sum of losses is least within the budget.

    Tables cost bits too: the first choice decides which rates a matrix (or the matrices that share
    tables) uses at all, the second spends what the others would have cost.

    Args:
        sensitivities: of the decoder's matrices.
        plans: the same matrices in any layout; says which share tables.
        recipe: `bits` and `allocation`.

    Returns:
        Channels by rate, by name of the matrix.

    Raises:
        ConfigError: if the budget cannot be met.
    """
    allowed = {plans[s.name].label: set(s.rates) for s in sensitivities}
    widths: dict[str, Widths] = {}
    for _ in range(2):
        for part in _parts(sensitivities, recipe):
            widths |= _choose(part, plans, allowed, recipe)
        allowed = defaultdict(set)
        for name, chosen in widths.items():
            allowed[plans[name].label] |= set(chosen)
    return widths


def _choose(
    part: Sequence[Sensitivity],
    plans: Mapping[str, MatrixPlan],
    allowed: Mapping[str, set[int]],
    recipe: QuantRecipe,
) -> dict[str, Widths]:
    """Spend the budget of the matrices of `part`, given the rates that have tables."""
    readers = Counter(plan.label for plan in plans.values())
    room, items, keys = 0.0, [], []
    for sensitivity in part:
        plan = plans[sensitivity.name]
        label, layout = plan.label, plan.layout
        tables = sum(map(table_bits, allowed[label])) / readers[label]
        fixed = _SCALE_BITS * layout.out_features + _ORDER_BITS * layout.in_features
        room += recipe.bits * layout.num_weights - fixed - tables
        options = [i for i, rate in enumerate(sensitivity.rates) if rate in allowed[label]]
        rates = tuple(sensitivity.rates[i] for i in options)
        for width, losses in zip(sensitivity.widths, sensitivity.losses, strict=True):
            bits = tuple(rate * width * layout.out_features for rate in rates)
            items.append(Item(bits, tuple(losses[i] for i in options)))
            keys.append((sensitivity.name, width, rates))
    widths: dict[str, dict[int, int]] = {s.name: defaultdict(int) for s in part}
    for (name, width, rates), option in zip(keys, allocate(items, int(room)), strict=True):
        widths[name][rates[option]] += width
    return {name: dict(sorted(chosen.items())) for name, chosen in widths.items()}


def _parts(sensitivities: Sequence[Sensitivity], recipe: QuantRecipe) -> list[list[Sensitivity]]:
    """Return the matrices that share one budget."""
    if recipe.allocation == "model":
        return [list(sensitivities)]
    layers: dict[str, list[Sensitivity]] = defaultdict(list)
    for sensitivity in sensitivities:
        layers[re.sub(r"(\.\d+)\..*", r"\1", sensitivity.name)].append(sensitivity)
    return list(layers.values())
