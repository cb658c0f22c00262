"""One matrix: every rate beats its plainer form, formats agree, tables can be shared or given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mgvq_kernels import ops
from mgvq_kernels.layout import RATE_STAGES, Band, Stage, VQLayout, rate_stages
from mgvq_quantizer.ordering import channel_order
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.shared_books import books_of
from mgvq_quantizer.solver import Problem, Solution, solve

Moment = Callable[[int, int], torch.Tensor]
RECIPE = QuantRecipe(codebook_iterations=8, refit_rounds=2, descent_sweeps=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(moment: torch.Tensor, layout: VQLayout, seed: int) -> Problem:
    rows, width = layout.out_features, layout.in_features
    weight = 0.02 * torch.randn(rows, width, generator=seeded(seed))
    order = torch.randperm(width, generator=seeded(seed)) if layout.has_permutation else None
    return Problem(weight, moment, order, layout)


def error_of(case: Problem, solution: Solution) -> float:
    """The share of the output energy that the stored weight loses, damping included."""
    weight = case.weight.double()
    damping = 0.01 * case.hessian.diagonal().mean()
    moment = case.hessian + damping * torch.eye(len(case.hessian))
    error = weight - ops.vq_dequantize(solution.weight)
    return float(((error @ moment) * error).sum() / ((weight @ moment) * weight).sum())


@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_every_rate_beats_plain_nearest_codewords(correlated: Moment, rate: int) -> None:
    case = problem(correlated(128, 0), VQLayout.uniform(192, 128, rate, has_permutation=True), 0)
    solution = solve([case], RECIPE, seeded(1))[0]
    assert solution.error < 0.6 * solution.error_nearest
    assert error_of(case, solution) == pytest.approx(solution.error, rel=1e-3)


@pytest.mark.parametrize("codec", ["lookup", "trellis"])
def test_drawn_out_bands_of_few_bits_are_larger(correlated: Moment, codec: str) -> None:
    """Beside a band of many bits, which decides the scales of the rows."""
    bands = (Band(0, 64, rate_stages(1, codec)), Band(64, 64, rate_stages(4, codec)))
    case = problem(correlated(128, 0), VQLayout(192, 128, bands, True), 0)
    assert case.permutation is not None
    one_bit = case.weight[:, case.permutation[:64]]
    slopes = []
    for draw_out in (0.0, 0.5, 1.0):
        recipe = replace(RECIPE, descent_sweeps=0, draw_out=draw_out)
        stored = ops.vq_dequantize(solve([case], recipe, seeded(1))[0].weight)
        kept = stored[:, case.permutation[:64]]
        slopes.append(float((one_bit * kept).sum() / one_bit.square().sum()))
    assert slopes[0] < 0.75
    assert slopes[2] > slopes[1] + 0.04 > slopes[0] + 0.08


def test_the_rounds_before_one_that_is_drawn_out_count(correlated: Moment) -> None:
    """Measured in scales that drawing out shrinks, the first of several rounds always won."""
    case = problem(correlated(128, 0), mixed(192, [(64, 1), (64, 3)]), 0)
    recipe = replace(RECIPE, descent_sweeps=0, draw_out=0.5)
    once, often = (
        solve([case], replace(recipe, refit_rounds=rounds), seeded(1))[0].error for rounds in (1, 4)
    )
    assert often < 0.99 * once


def test_more_bits_are_better(correlated: Moment) -> None:
    errors = []
    for rate in (1, 2, 3, 4):  # 3 bits have 3,072 numbers in their tables for 16,384 weights
        case = problem(correlated(128, 1), VQLayout.uniform(128, 128, rate, True), 1)
        errors.append(solve([case], RECIPE, seeded(1))[0].error)
    assert all(finer < 0.65 * coarser for coarser, finer in zip(errors, errors[1:], strict=False))


def mixed(rows: int, bands: list[tuple[int, int]], has_permutation: bool = True) -> VQLayout:
    """A layout of bands, each so many channels at so many bits."""
    made, start = [], 0
    for width, rate in bands:
        made.append(Band(start, width, tuple(map(Stage, RATE_STAGES[rate]))))
        start += width
    return VQLayout(rows, start, tuple(made), has_permutation)


def test_bands_lower_the_error_at_the_same_bits_where_few_channels_carry_much(
    correlated: Moment,
) -> None:
    moment = correlated(128, 8)
    loud = torch.logspace(0, 3, 128, dtype=torch.float64)[torch.randperm(128, generator=seeded(8))]
    moment = moment * loud.sqrt()[:, None] * loud.sqrt()[None]
    errors = {}
    for name, bands in {"uniform": [(128, 2)], "mixed": [(64, 1), (32, 2), (32, 4)]}.items():
        layout = mixed(192, bands)
        assert layout.code_bits() == 2 * 192 * 128
        weight = problem(moment, layout, 8).weight
        order = channel_order(weight, moment, layout, RECIPE, seeded(1))
        case = Problem(weight, moment, order, layout)
        solution = solve([case], RECIPE, seeded(1))[0]
        errors[name] = solution.error
        assert error_of(case, solution) == pytest.approx(solution.error, rel=1e-3)
    assert errors["mixed"] < 0.85 * errors["uniform"], errors  # .0058 against .0076


def test_a_permuted_weight_is_the_formula_of_the_format(correlated: Moment) -> None:
    case = problem(correlated(64, 2), VQLayout.uniform(32, 64, 2, True), 2)
    weight = solve([case], RECIPE, seeded(1))[0].weight
    x = torch.randn(64, generator=seeded(3))
    table = weight.codebooks[0][0].float() * weight.codebook_scales[0][0]
    permuted = table[weight.codes[0][0].long()].view(32, 64) * weight.scales.float()[:, None]
    assert weight.permutation is not None
    expected = permuted @ x[weight.permutation.long()]
    assert torch.allclose(ops.vq_dequantize(weight) @ x, expected, atol=1e-5)


def test_the_metric_and_its_feedback_pay_off_as_measured(correlated: Moment) -> None:
    """The memo's B.7: about .097 without feedback, .032 with metric and feedback."""
    case = problem(correlated(256, 6), VQLayout.uniform(256, 256, 2), 6)
    solution = solve([case], QuantRecipe(descent_sweeps=2), seeded(1))[0]
    assert solution.error_nearest > 0.08
    assert solution.error < 0.034


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, descent_sweeps=0, draw_out=0.5)])
def test_siblings_share_tables_and_later_ones_take_them_over(
    correlated: Moment, recipe: QuantRecipe
) -> None:
    layout = VQLayout.uniform(64, 64, 2)
    cases = [problem(correlated(64, i), layout, i) for i in range(3)]
    solved = solve(cases, recipe, seeded(1))
    books = [solution.weight.codebooks[0][0] for solution in solved]
    assert torch.equal(books[0], books[1])
    assert torch.equal(books[0], books[2])
    again = solve(cases[:1], recipe, seeded(2), books_of(cases[0], solved[0]))[0]
    assert torch.equal(again.weight.codebooks[0][0], books[0])
    assert again.weight.codebook_scales == solved[0].weight.codebook_scales
    assert again.error < 1.3 * solved[0].error


def test_a_table_may_serve_bands_of_several_matrices(correlated: Moment) -> None:
    """One matrix at 2 bits, one at 2 and 4: the tables at 2 bits are one table, trained on both."""
    names = (("two",),), (("two",), ("four",))
    layouts = VQLayout.uniform(64, 64, 2), mixed(64, [(32, 2), (32, 4)], has_permutation=False)
    cases = [
        replace(problem(correlated(64, i), layout, i), tables=tables)
        for i, (layout, tables) in enumerate(zip(layouts, names, strict=True))
    ]
    uniform, banded = solve(cases, RECIPE, seeded(1))
    assert torch.equal(uniform.weight.codebooks[0][0], banded.weight.codebooks[0][0])
    assert banded.error < 0.7 * uniform.error
    assert error_of(cases[1], banded) == pytest.approx(banded.error, rel=1e-3)
    alone = solve(cases[:1], RECIPE, seeded(1))[0]
    assert not torch.equal(alone.weight.codebooks[0][0], uniform.weight.codebooks[0][0])


def test_the_same_seed_gives_the_same_bytes(correlated: Moment) -> None:
    case = problem(correlated(64, 4), VQLayout.uniform(48, 64, 2, True), 4)
    one, two, other = (solve([case], RECIPE, seeded(s))[0].weight for s in (7, 7, 8))
    assert torch.equal(one.codes[0][0], two.codes[0][0])
    assert torch.equal(one.codebooks[0][0], two.codebooks[0][0])
    assert torch.equal(one.scales, two.scales)
    assert not torch.equal(one.codebooks[0][0], other.codebooks[0][0])


def test_rows_of_zeros_and_dead_inputs_stay_finite(correlated: Moment) -> None:
    moment = correlated(64, 5)
    moment[:8] = 0.0
    moment[:, :8] = 0.0
    weight = torch.randn(32, 64, generator=seeded(5))
    weight[3] = 0.0
    case = Problem(weight, moment, None, VQLayout.uniform(32, 64, 4))
    solution = solve([case], RECIPE, seeded(1))[0]
    dense = ops.vq_dequantize(solution.weight)
    assert bool(torch.isfinite(dense).all())
    assert float(dense[3].abs().max()) < 1e-3
    assert float((dense[:, :8] - weight[:, :8]).abs().mean()) < 0.5


def test_overwhelming_channels_are_dealt_out_over_the_vectors(correlated: Moment) -> None:
    layout = VQLayout.uniform(128, 128, 2, True)
    case = problem(correlated(128, 7), layout, 7)
    loud = torch.eye(128, dtype=torch.float64)
    loud[:16] *= 1e4
    order = channel_order(case.weight, loud, layout, RECIPE, seeded(1))
    assert sorted(order.tolist()) == list(range(128))
    assert int((order.view(-1, 4) < 16).sum(1).max()) == 1
    scalar = VQLayout.uniform(128, 128, 8, True)
    moment = correlated(128, 7)
    ascending = moment.diagonal()[channel_order(case.weight, moment, scalar, RECIPE, seeded(1))]
    assert bool((ascending.diff() >= 0).all())


def test_a_curvature_of_the_outputs_is_what_gets_small(correlated: Moment) -> None:
    """Measured with it in float64, the two-sided answer is better; without it, it is worse."""
    case = problem(correlated(64, 10), VQLayout.uniform(96, 64, 2, True), 10)
    basis = torch.linalg.qr(torch.randn(96, 96, generator=seeded(11)).double())[0]
    B = basis * torch.arange(1, 97).double() ** -1.0 @ basis.T
    errors = []
    for factor in (None, B, 9.0 * B):
        solution = solve([replace(case, output_factor=factor)], RECIPE, seeded(1))[0]
        error = case.weight.double() - ops.vq_dequantize(solution.weight)
        image = error @ case.hessian
        errors.append([float((image * (F @ error)).sum()) for F in (torch.eye(96).double(), B)])
    assert errors[1][1] < 0.9 * errors[0][1], errors
    assert errors[1][0] > errors[0][0], errors
    assert errors[2] == pytest.approx(errors[1], rel=1e-3)
