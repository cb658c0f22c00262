"""Allocation under a budget, against brute force."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from mgvq_quantizer.budget import CORE, Item, allocate
from mgvq_runtime.errors import ConfigError


def random_item(rng: Random, unit: int = 1) -> Item:
    count = rng.randint(1, 4)
    bits = sorted(rng.sample(range(1, 12), count))
    losses = [rng.uniform(0.0, 10.0) for _ in range(count)]
    if rng.random() < 0.7:
        losses.sort(reverse=True)
    return Item(tuple(unit * b for b in bits), tuple(losses))


def totals(items: list[Item], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    pairs = list(zip(items, chosen, strict=True))
    return sum(item.bits[c] for item, c in pairs), sum(item.losses[c] for item, c in pairs)


@pytest.mark.parametrize("seed", range(40))
def test_few_items_are_allocated_as_by_brute_force(seed: int) -> None:
    rng = Random(seed)
    items = [random_item(rng, unit=rng.choice((1, 7, 512))) for _ in range(rng.randint(1, 6))]
    least = sum(item.bits[0] for item in items)
    most = sum(item.bits[-1] for item in items)
    budget = rng.randint(least, most + 3)
    options = product(*(range(len(item.bits)) for item in items))
    fitting = [totals(items, c)[1] for c in options if totals(items, c)[0] <= budget]
    spent, loss = totals(items, allocate(items, budget))
    assert spent <= budget
    assert loss == pytest.approx(min(fitting))


def rates(rng: Random, weights: int) -> Item:
    """Losses that fall about fourfold a bit, as those of rates do."""
    start = rng.lognormvariate(0.0, 1.5)
    losses = [start]
    for _ in range(3):
        losses.append(losses[-1] / rng.uniform(3.0, 5.0))
    return Item(tuple(rate * weights for rate in (1, 2, 3, 4)), tuple(losses))


def test_many_items_fill_the_budget_to_the_last_block_and_are_optimal() -> None:
    rng = Random(0)
    items = [rates(rng, rng.choice((8192, 16384, 49152))) for _ in range(10 * CORE)]
    budget = sum(2 * item.bits[0] for item in items)
    chosen = allocate(items, budget)
    spent, loss = totals(items, chosen)
    assert budget - 8192 < spent <= budget
    # every price of a bit gives a lower bound on the loss of anything within the budget
    bounds = []
    for exponent in range(-500, -50):
        price = 10 ** (exponent / 25)
        cheapest = sum(
            min(loss + price * bits for bits, loss in zip(i.bits, i.losses, strict=True))
            for i in items
        )
        bounds.append(cheapest - price * budget)
    assert loss == pytest.approx(max(bounds), rel=1e-3)


def test_a_budget_below_the_cheapest_options_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError, match="least these matrices can take is 30 bits, allowed .* 29"
    ):
        allocate([Item((10, 20), (1.0, 0.5)), Item((20, 30), (1.0, 0.5))], 29)
