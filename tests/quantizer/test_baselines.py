"""Baselines against textbook forms, brute force, known distortions and bits counted by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Protocol

import pytest
import torch

from mgvq_kernels import ops
from mgvq_quantizer.baselines import e8p, hadamard, kmeans, scalar
from mgvq_quantizer.baselines import gptvq as gptvq_file
from mgvq_quantizer.baselines import quip as quip_file
from mgvq_quantizer.baselines import vptq as vptq_file
from mgvq_quantizer.baselines.gptvq import gptvq
from mgvq_quantizer.baselines.interface import Baseline, Layer, NotDefined
from mgvq_quantizer.baselines.quip import quip
from mgvq_quantizer.baselines.scalar import Setting, fit_grid, gptq, gptq_codes, rtn
from mgvq_quantizer.baselines.vptq import vptq

Moment = Callable[[int, int], torch.Tensor]
METHODS: dict[str, Baseline] = {
    "rtn": rtn,
    "gptq": gptq,
    "gptvq-2d": partial(gptvq, dim=2),
    "gptvq-4d": partial(gptvq, dim=4),
    "vptq": vptq,
    "quip": quip,
}
TARGETS = {"rtn": 2.25, "gptq": 2.25, "gptvq-2d": 2.25, "gptvq-4d": 2.5, "vptq": 2.25, "quip": 2.0}
"""Rates that each method has for a small matrix."""


class Counted(Protocol):
    """A setting that knows its cost."""

    def stored_bits(self, out_features: int, in_features: int) -> int: ...


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(moment: torch.Tensor, rows: int, seed: int) -> Layer:
    return Layer(0.02 * torch.randn(rows, len(moment), generator=seeded(seed)), moment)


def loss(layer: Layer, value: torch.Tensor) -> float:
    error, weight = (layer.weight - value).double(), layer.weight.double()
    lost, all_ = (((x @ layer.moment) * x).sum() for x in (error, weight))
    return float(lost / all_)


# Even levels


def optimal_brain_quantizer(
    weight: torch.Tensor, moment: torch.Tensor, levels: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Column by column in float64, the inverse of what is left updated after each."""
    work, inverse = weight.double().clone(), torch.linalg.inv(moment.double())
    value = torch.empty_like(work)
    for j in moment.diagonal().argsort(descending=True).tolist():
        value[:, j] = levels(work[:, j], j)
        error = (work[:, j] - value[:, j]) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return value


def test_gptq_is_the_textbook_and_beats_rounding(correlated: Moment) -> None:
    layer = case(correlated(160, 0), 48, 0)
    grid = fit_grid(layer.weight, Setting(2, 128, True))
    assert grid.scale.shape == (48, 2), "the second group is the 32 columns that are left"
    damped = layer.moment + 0.01 * layer.moment.diagonal().mean() * torch.eye(160)

    def levels(column: torch.Tensor, j: int) -> torch.Tensor:
        assert grid.offset is not None
        scale, offset = (x[:, j // 128].double() for x in (grid.scale, grid.offset))
        return offset + scale * ((column - offset) / scale).round().clamp(0, 3)

    expected = optimal_brain_quantizer(layer.weight, damped, levels)
    value = grid.decode(gptq_codes(layer.weight, layer.moment, grid), grid.values)
    assert torch.isclose(value.double(), expected, atol=1e-6).double().mean() > 0.998
    assert loss(layer, value) < 0.7 * loss(
        layer, grid.decode(grid.encode(layer.weight), grid.values)
    )


def test_gptq_without_correlations_is_plain_rounding() -> None:
    layer = case(torch.eye(256, dtype=torch.float64), 32, 1)
    for bits in (2.25, 3.25):
        rounded = rtn(layer, bits, seeded(0))
        assert torch.equal(gptq(layer, bits, seeded(0)).weight, rounded.weight)
        assert not torch.equal(rounded.weight, layer.weight)


def test_weights_on_a_grid_stay_where_they_are() -> None:
    steps = torch.randint(0, 4, (16, 128), generator=seeded(2)).float()
    steps[:, :2] = torch.tensor([0.0, 3.0])
    layer = Layer(0.25 * steps - 0.5, torch.eye(128, dtype=torch.float64))
    assert torch.equal(rtn(layer, 2.25, seeded(0)).weight, layer.weight)
    assert torch.equal(gptq(layer, 2.25, seeded(0)).weight, layer.weight)


@pytest.mark.parametrize(("bits", "expected"), [(2.25, 0.1150), (3.25, 0.0336)])
def test_clipped_rounding_has_its_known_distortion(bits: float, expected: float) -> None:
    weight = torch.randn(128, 2048, generator=seeded(3))
    value = rtn(Layer(weight, torch.eye(2048)), bits, seeded(0)).weight
    assert float((value - weight).square().mean()) == pytest.approx(expected, rel=0.02)


# Codebooks


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 6, 8])
def test_nearest_is_brute_force_in_the_weights_of_each_vector(
    d: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "has_numba", lambda: compiled)
    g = seeded(4)
    vectors, weights = torch.randn(3, 50, d, generator=g), torch.rand(50, d, generator=g) + 0.1
    tables = torch.randn(3, 20, d, generator=g)
    error = vectors[:, :, None] - tables[:, None]  # [G, N, K, d]
    distance = (weights[:, None] * error.square()).sum(-1)
    assert torch.equal(kmeans.nearest(vectors, weights, tables), distance.argmin(-1))


def test_kmeans_reaches_the_known_distortion_of_a_normal_source() -> None:
    g, even = seeded(5), torch.ones(80_000, 4)
    source, fresh = (torch.randn(1, 80_000, 4, generator=g) for _ in range(2))
    tables = kmeans.train(source, even, 256, 10, g)

    def distortion(vectors: torch.Tensor) -> float:
        error = vectors - tables[0][kmeans.nearest(vectors, even, tables)]
        return float(error.square().mean())

    assert distortion(source) == pytest.approx(0.0970, rel=0.02)
    assert distortion(fresh) == pytest.approx(0.0970, rel=0.04)


def test_heavy_vectors_pull_their_entry() -> None:
    vectors = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    weights = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    tables = kmeans.train(vectors, weights, 1, 2, seeded(0))
    assert torch.allclose(tables, torch.tensor([[[0.75, 0.25]]]))


@pytest.mark.parametrize("seed", range(5))
def test_vptq_does_not_lose_the_one_vector_that_matters(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large weight of a loud input: trained on drawn vectors alone, most seeds miss it."""
    monkeypatch.setattr(vptq_file, "_MAX_TRAINING_VECTORS", 256)
    moment = torch.eye(64, dtype=torch.float64)
    moment[5, 5] = 1000.0
    weight = torch.randn(64, 64, generator=seeded(13))
    weight[9, 5] = 40.0
    layer = Layer(weight, moment)
    assert loss(layer, vptq(layer, 3.0, seeded(seed)).weight) < 0.001


def test_training_vectors_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vptq_file, "_MAX_TRAINING_VECTORS", 100)
    vectors, weights = torch.randn(1000, 2, generator=seeded(14)), torch.ones(1000, 1)
    chosen, stands_for = vptq_file._sample(vectors, weights, seeded(0))
    assert chosen.unique(dim=0).shape == (100, 2)
    assert float(stands_for.sum()) == pytest.approx(1000)
    few, ones = vptq_file._sample(vectors[:100], weights[:100], seeded(0))
    assert torch.equal(few.sort(0).values, vectors[:100].sort(0).values)
    assert torch.equal(ones, weights[:100])


def e8p_points() -> torch.Tensor:
    """All points by the definition: half-odd, even sum, 256 patterns; both shifts."""
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    signed = (signs[:, None] * e8p.patterns()).flatten(0, 1)
    lattice = signed[signed.sum(1) % 2 == 0]
    return torch.cat([lattice + 0.25, lattice - 0.25])


def test_e8p_has_65536_points_and_its_search_is_brute_force() -> None:
    points = e8p_points()
    assert len(set(map(tuple, points.tolist()))) == 65536
    assert int((e8p.patterns().square().sum(1) <= 10).sum()) == 227
    vectors = 1.5 * torch.randn(64, 8, generator=seeded(6))
    found = e8p.nearest(vectors)
    least = torch.cdist(vectors.double(), points.double()).min(1).values
    assert torch.allclose((vectors - found).double().norm(dim=1), least, atol=1e-5)
    assert float(torch.cdist(found, points).min(1).values.max()) == 0.0


def test_e8p_has_its_known_distortion() -> None:
    vectors = torch.randn(16_000, 8, generator=seeded(7))
    error = vectors - e8p.nearest(vectors * e8p.SCALE) / e8p.SCALE
    assert 0.089 * 0.98 < float(error.square().mean()) < 0.092 * 1.02


def test_e8p_at_3_bits_has_the_scale_of_its_own_least_error() -> None:
    vectors = torch.randn(4_000, 8, generator=seeded(7))

    def error(scale: float) -> float:
        found = quip_file._round(vectors * scale, 3) / scale
        return float((vectors - found).square().mean())

    mine = error(quip_file._SCALES[3])
    assert mine < 0.99 * error(e8p.SCALE)  # of 2 bits
    assert mine < min(error(0.93), error(1.03))


def test_one_bit_points_are_of_e8() -> None:
    points = e8p.one_bit_points()
    assert points.unique(dim=0).shape == (256, 8)
    doubled = (2 * points).round()
    assert torch.equal(doubled, 2 * points)
    assert bool(((doubled % 2).sum(1) % 8 == 0).all()), "all whole or all halves"
    assert bool((points.sum(1) % 2 == 0).all())


# Turns


@pytest.mark.parametrize(
    ("order", "block"), [(8, 8), (12, 12), (192, 192), (576, 576), (960, 960), (72, 72), (36, 4)]
)
def test_turns_are_orthogonal_and_go_back(order: int, block: int) -> None:
    turn = hadamard.Turn.random(order, seeded(order))
    assert turn.block.shape == (block, block)
    assert torch.equal(turn.block.abs().unique(), turn.block[0, 0].abs()[None])
    eye = turn.forward(torch.eye(order, dtype=torch.float64))
    assert torch.allclose(eye @ eye.T, torch.eye(order, dtype=torch.float64), atol=1e-6)
    rows = torch.randn(3, order, generator=seeded(1))
    assert torch.allclose(turn.backward(turn.forward(rows)), rows, atol=1e-5)
    assert int((turn.signs < 0).sum()) not in (0, order)


# All of them


def test_bits_are_those_counted_by_hand() -> None:
    """A 128x512 matrix: 65,536 weights."""
    weight = torch.empty(128, 512)
    n = weight.numel()

    def count(setting: Counted) -> int:
        return setting.stored_bits(128, 512)

    # 4 groups of 128 a row, scale and offset each; then one scale a row without an offset
    assert count(scalar.choose_setting(weight, 2.25)) == 2 * n + 128 * 4 * 2 * 16
    assert count(scalar.choose_setting(weight, 2.0)) == 2 * n + 128 * 16 * 2
    # 16 entries of 2 int8 and a scale: 272 bits a group of 8 rows and 256 columns
    assert count(gptvq_file.choose_setting(weight, 2.25, 2)) == 2 * n + 2 * 32 * 272
    # 256 entries of 4: one for each strip of 256 columns
    assert count(gptvq_file.choose_setting(weight, 2.25, 4)) == 2 * n + 2 * (256 * 4 * 8 + 16)
    # float16 entries: 256 of 4 cost 0.25 bits a weight, 16 of 2 hardly anything
    assert count(vptq_file.choose_setting(weight, 2.25)) == 2 * n + 256 * 4 * 16
    assert count(vptq_file.choose_setting(weight, 2.0)) == 2 * n + 16 * 2 * 16
    # a sign an input and an output, one scale
    assert quip_file.stored_bits(3, 128, 512) == 3 * n + 512 + 128 + 16


@pytest.mark.parametrize(
    ("name", "target", "code_bits", "signs"),
    [("rtn", 3.0, 3, 0), ("gptq", 3.0, 3, 0), ("quip", 3.0, 3, 64 + 128), ("vptq", 2.0, 2, 0)],
)
def test_counted_bits_are_those_of_codes_and_stored_numbers(
    name: str, target: float, code_bits: int, signs: int
) -> None:
    layer = case(torch.eye(128, dtype=torch.float64), 64, 8)
    result = METHODS[name](layer, target, seeded(0))
    numbers = sum(value.numel() for value in result.values.values())
    assert result.bits == code_bits * layer.weight.numel() + 16 * numbers + signs


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rtn"])
def test_every_method_compensates(correlated: Moment, name: str) -> None:
    """Knowing the second moment lowers the loss by a third or more against taking it for even."""
    layer = case(correlated(128, 9), 64, 9)
    blind = Layer(layer.weight, torch.eye(128, dtype=torch.float64))
    result = METHODS[name](layer, TARGETS[name], seeded(0))
    assert result.weight.shape == layer.weight.shape
    without = METHODS[name](blind, TARGETS[name], seeded(0))
    assert loss(layer, result.weight) < 0.67 * loss(layer, without.weight)


def test_order_of_the_methods_at_two_bits(correlated: Moment) -> None:
    layer = case(correlated(256, 10), 64, 10)
    losses = [
        loss(layer, METHODS[name](layer, 2.0, seeded(0)).weight)
        for name in ("quip", "gptvq-2d", "vptq", "gptq", "rtn")
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_for_a_seed_and_its_numbers_fit_their_types(
    correlated: Moment, name: str
) -> None:
    layer = case(correlated(128, 11), 64, 11)
    one, two = (METHODS[name](layer, TARGETS[name], seeded(1)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    leaves = {n: v.clone().requires_grad_() for n, v in one.values.items()}
    one.decode(leaves).square().sum().backward()
    for n, leaf in leaves.items():
        assert float(leaf.grad.abs().sum()) > 0.0  # type: ignore[union-attr]
        stored = one.store(one.values)[n]
        assert torch.allclose(stored, one.values[n], rtol=1e-6, atol=0)


def test_a_rate_that_a_method_has_not_is_refused_by_name() -> None:
    small = case(torch.eye(64, dtype=torch.float64), 64, 12)
    with pytest.raises(NotDefined, match="E8P has no setting between 2.25 and 2.62 bits"):
        quip(small, 2.5, seeded(0))
    with pytest.raises(NotDefined, match="even levels.*64x64"):
        rtn(small, 2.0, seeded(0))
    with pytest.raises(NotDefined, match="GPTVQ in 4 dimensions"):
        gptvq(case(torch.eye(66, dtype=torch.float64), 64, 12), 3.0, seeded(0), dim=4)
