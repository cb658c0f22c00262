"""From what channels lose at each rate to bands under a budget (called by `pipeline`).

The budget counts everything a checkpoint stores for the decoder's matrices: codes, tables, row
scales and the order of channels. Not here: the search (`budget`), the layouts (`allocation`).

Source: method memo B.6.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby

from mgvq_quantizer.allocation import Bands, MatrixPlan, table_bits
from mgvq_quantizer.budget import Item, allocate
from mgvq_quantizer.channel_classes import SHARED, Channels, cut_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity
from mgvq_quantizer.trellis_search import TAILS
from mgvq_runtime.errors import ConfigError

Tables = set[tuple[int, str]]
"""Rate and class of the tables that matrices of one label read."""


def choose_bands(
    sensitivities: Sequence[Sensitivity],
    plans: Mapping[str, MatrixPlan],
    recipe: QuantRecipe,
    channels: Mapping[str, Channels] | None = None,
) -> dict[str, Bands]:
    """Give every run of channels a rate, so that the sum of losses is least within the budget.

    Tables cost bits too: the first choice decides which rates and classes a matrix (or the matrices
    that share tables) uses at all, the second spends what the others would have cost. If its bands
    are cut into classes that are not counted yet, they are, and it is chosen again.

    Args:
        sensitivities: of the decoder's matrices.
        plans: the same matrices in any layout; says which share tables.
        recipe: `bits` and `allocation`.
        channels: by which the bands will be cut into classes, by name.

    Returns:
        Rate and width of each band, by name of the matrix.

    Raises:
        ConfigError: if the budget cannot be met.
    """
    channels, threshold = channels or {}, recipe.class_threshold

    def choose(counted: Mapping[str, Tables]) -> tuple[dict[str, Bands], dict[str, Tables]]:
        bands: dict[str, Bands] = {}
        for part in _parts(sensitivities, recipe):
            bands |= _choose(part, plans, counted, recipe)
        used: dict[str, Tables] = defaultdict(set)
        for name, chosen in bands.items():
            cuts = cut_bands(chosen, channels.get(name), threshold)
            used[plans[name].label] |= {(c.rate, c.channel_class) for c in cuts}
        return bands, used

    _, counted = choose(
        {plans[s.name].label: {(r, SHARED) for r in s.rates} for s in sensitivities}
    )
    while True:
        bands, used = choose(counted)
        if all(used[label] <= counted[label] for label in used):
            return bands
        counted = {label: counted[label] | used[label] for label in used}


def _choose(
    part: Sequence[Sensitivity],
    plans: Mapping[str, MatrixPlan],
    counted: Mapping[str, Tables],
    recipe: QuantRecipe,
) -> dict[str, Bands]:
    """Spend the budget of the matrices of `part`, given the tables that there are."""
    readers = Counter(plan.label for plan in plans.values())
    room, items, keys = 0.0, [], []
    for sensitivity in part:
        plan = plans[sensitivity.name]
        label, layout = plan.label, plan.layout
        tables = sum(table_bits(rate, recipe) for rate, _ in counted[label]) / readers[label]
        tables *= len(TAILS) if plan.chooses_tails else 1
        fixed = layout.side_bits()
        room += recipe.bits * layout.num_weights - fixed - tables
        allowed = {rate for rate, _ in counted[label]}
        options = [i for i, rate in enumerate(sensitivity.rates) if rate in allowed]
        rates = tuple(sensitivity.rates[i] for i in options)
        for width, losses in zip(sensitivity.widths, sensitivity.losses, strict=True):
            bits = tuple(rate * width * layout.out_features for rate in rates)
            items.append(Item(bits, tuple(losses[i] for i in options)))
            keys.append((sensitivity.name, rates))
    least = sum(item.bits[0] for item in items)
    if least > room:
        weights = sum(plans[s.name].layout.num_weights for s in part)
        raise ConfigError(
            f"bits is {recipe.bits}, but {part[0].name} and the matrices that share its budget "
            f"take {recipe.bits + (least - room) / weights:.2f} bits a weight at the least, with "
            "tables, scales and order: give more bits, or allocation uniform"
        )
    chosen: dict[str, list[int]] = defaultdict(list)
    for (name, rates), option in zip(keys, allocate(items, int(room)), strict=True):
        chosen[name].append(rates[option])
    return {s.name: _bands(s, chosen[s.name], recipe.reference_rate) for s in part}


def _bands(sensitivity: Sensitivity, rates: Sequence[int], reference: int) -> list[tuple[int, int]]:
    """Merge runs of one rate, rates falling from left to right or rising: as less is lost.

    What either loses is read from the losses one rate above the reference, a quarter a bit. As they
    were measured at each rate they mislead where bits are few: the channels that are rounded last,
    the first ones, collect there what all others are off by. By losses at one bit two down_projs of
    the demonstration model lay the wrong way round, and lost 1.7 times as much; 25 of 26 matrices
    whose bands were tried both ways, 7 of them of SmolLM2, lie right by this.
    """
    above = min(sensitivity.rates.index(reference) + 1, len(sensitivity.rates) - 1)

    def lost(laid: Sequence[int]) -> float:
        pairs = zip(sensitivity.losses, laid, strict=True)
        return sum(run[above] * 4.0**-rate for run, rate in pairs)

    rising = sorted(rates)
    laid = min(rising[::-1], rising, key=lost)
    return [(rate, sensitivity.widths[0] * len(list(run))) for rate, run in groupby(laid)]


def _parts(sensitivities: Sequence[Sensitivity], recipe: QuantRecipe) -> list[list[Sensitivity]]:
    """Return the matrices that share one budget."""
    if recipe.allocation == "model":
        return [list(sensitivities)]
    layers: dict[str, list[Sensitivity]] = defaultdict(list)
    for sensitivity in sensitivities:
        layers[re.sub(r"(\.\d+)\..*", r"\1", sensitivity.name)].append(sensitivity)
    return list(layers.values())
