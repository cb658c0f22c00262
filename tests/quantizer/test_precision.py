"""Bands from losses: the budget in full, tables counted, direction of the rates."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from torch import nn

from mgvq_quantizer import allocation
from mgvq_quantizer.allocation import Bands, plan, table_bits
from mgvq_quantizer.precision import choose_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity, run_widths
from mgvq_quantizer.trellis_search import COMMON_TAIL, TAILS
from mgvq_runtime.checkpoint.bits import count_bits
from mgvq_runtime.errors import ConfigError
from tests.quantizer.test_recipe_and_plan import decoder

MODEL = decoder(256, 768, 3)


def sensitivities(model: nn.Module, recipe: QuantRecipe, seed: int) -> list[Sensitivity]:
    """Random losses that fall fourfold a bit and from run to run, another scale for each matrix."""
    rng, found = Random(seed), []
    for name, matrix in plan(model, recipe).items():
        if name.startswith("model.layers."):
            widths = run_widths(matrix.layout.in_features)
            start = rng.lognormvariate(0.0, 2.0)
            losses = [
                tuple(start * 0.7**run * 0.25**rate for rate in recipe.rates)
                for run in range(len(widths))
            ]
            zeros = (0.0,) * len(widths)
            found.append(Sensitivity(name, recipe.rates, widths, tuple(losses), 1.0, zeros))
    return found


def chosen(recipe: QuantRecipe, seed: int) -> dict[str, Bands]:
    return choose_bands(sensitivities(MODEL, recipe, seed), plan(MODEL, recipe), recipe)


@pytest.mark.parametrize(
    ("bits", "max_codebook_overhead"),
    [(1.6, 0.0), (2.0, 0.0), (2.25, 0.0), (3.0, 0.0), (4.5, 0.0)]  # tables shared by kind
    + [(1.9, 100.0), (2.25, 100.0), (3.0, 100.0), (4.5, 100.0)],  # tables of their own
)
def test_the_budget_is_met_in_full_to_the_last_block(
    bits: float, max_codebook_overhead: float
) -> None:
    recipe = QuantRecipe(bits=bits, max_codebook_overhead=max_codebook_overhead)
    plans = plan(MODEL, recipe, chosen(recipe, seed=0))
    count = count_bits({n: p.spec for n, p in plans.items()})["decoder"]
    block = max(32 * p.layout.out_features for n, p in plans.items() if "layers" in n)
    assert recipe.bits * count.weights - block < count.bits <= recipe.bits * count.weights
    rates = {band.rate for p in plans.values() for band in p.layout.bands}
    assert len(rates) > 1


@pytest.mark.parametrize("chooses", [False, True])
def test_the_budget_counts_the_tables_a_shared_trellis_may_take(
    chooses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_TAILS_OVERHEAD", 1e9 if chooses else 0.0)
    recipe = QuantRecipe(bits=2.25, codec="trellis", window=8, max_codebook_overhead=0.0)
    plans = plan(MODEL, recipe, chosen(recipe, seed=0))
    mine = [p for n, p in plans.items() if n.startswith("model.layers.")]
    assert all(p.chooses_tails == chooses for p in mine)
    assert {tail for p in mine for tail in p.tails} == {COMMON_TAIL}
    count = count_bits({n: p.spec for n, p in plans.items()})["decoder"]
    tables = len({table for p in mine for band in p.tables for table in band})
    others = tables * (len(TAILS) - 1) * table_bits(2, recipe) if chooses else 0
    block = max(32 * p.layout.out_features for p in mine)
    target = recipe.bits * count.weights
    assert target - block < count.bits + others <= target


def test_each_layer_can_have_a_budget_of_its_own() -> None:
    recipe = QuantRecipe(bits=2.5, allocation="layer", max_codebook_overhead=100.0)
    plans = plan(MODEL, recipe, chosen(recipe, seed=1))
    for layer in range(3):
        mine = {n: p.spec for n, p in plans.items() if n.startswith(f"model.layers.{layer}.")}
        assert 2.4 < count_bits(mine)["decoder"].bits_per_weight <= 2.5
    free = QuantRecipe(bits=2.5, max_codebook_overhead=100.0)
    moved = plan(MODEL, free, chosen(free, seed=1))
    first = {n: p.spec for n, p in moved.items() if n.startswith("model.layers.0.")}
    assert abs(count_bits(first)["decoder"].bits_per_weight - 2.5) > 0.1


def test_more_sensitive_matrices_and_channels_get_more_bits() -> None:
    recipe = QuantRecipe(bits=2.25)
    found = {s.name: s for s in sensitivities(MODEL, recipe, seed=2)}
    bands = chosen(recipe, seed=2)
    for mine in bands.values():
        rates = [rate for rate, _ in mine]
        assert rates == sorted(set(rates), reverse=True)  # losses fall from run to run

    def mean(name: str) -> float:
        return sum(r * w for r, w in bands[name]) / sum(w for _, w in bands[name])

    kin = [name for name in bands if name.endswith("o_proj")]
    kin.sort(key=lambda name: found[name].losses[0][0])
    assert [mean(name) for name in kin] == sorted(mean(name) for name in kin)
    assert max(map(mean, bands)) > min(map(mean, bands)) + 1


def test_bands_lie_by_what_is_lost_one_rate_above_the_reference() -> None:
    """As many bits as most runs have, 1 here, say the opposite."""
    recipe = QuantRecipe(bits=1.8)
    assert recipe.reference_rate == 2

    def turned(found: Sensitivity) -> Sensitivity:
        from_3_bits = [
            tuple(x if r < 3 else y for r, x, y in zip(recipe.rates, run, back, strict=True))
            for run, back in zip(found.losses, reversed(found.losses), strict=True)
        ]
        return replace(found, losses=tuple(from_3_bits))

    found = sensitivities(MODEL, recipe, seed=2)
    plans = plan(MODEL, recipe)
    falling, rising = (choose_bands(f, plans, recipe) for f in (found, list(map(turned, found))))
    several = [name for name, bands in falling.items() if len(bands) > 1]
    assert len(several) > 3
    for name in several:
        assert [rate for rate, _ in falling[name]] == sorted({r for r, _ in falling[name]})[::-1]
        assert [rate for rate, _ in rising[name]] == sorted({r for r, _ in rising[name]})


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ConfigError, match=r"bits is 1\.0, but model\.layers\.0.* at the least"):
        chosen(QuantRecipe(bits=1.0), seed=0)
