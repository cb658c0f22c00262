"""Rounding with feedback between rows: identities, its special case, and what it trades."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mgvq_quantizer.ldl import Run, block_ldl, factorize
from mgvq_quantizer.rounding import Rounded, descent_feedback, empty, ldl_feedback, sweep
from mgvq_quantizer.two_sided import descend_rows, form, round_rows, row_feedback

Moment = Callable[[int, int], Tensor]
O, I = 80, 96  # noqa: E741


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(correlated: Moment) -> Tensor:
    """Gradients of the outputs mostly lie in few directions."""
    basis = torch.linalg.qr(normal(O, O, seed=1).double())[0]
    return basis * torch.arange(1, O + 1).double() ** -1.0 @ basis.T


def rounded_both(A: Tensor, B: Tensor, rows: int) -> tuple[Tensor, Rounded, Rounded, float]:
    """The weight, rounded one-sided and two-sided, and the second one's residual."""
    weight, tables = normal(O, I, seed=2), [[normal(256, 4, seed=3)]]
    columns = ldl_feedback(factorize(A, [Run(I, 4)], 0.01))
    one, two = (empty(weight, tables, [I]) for _ in range(2))
    sweep(weight, one, tables, columns)
    residual = round_rows(weight, two, tables, columns, row_feedback(B, rows))
    return weight, one, two, residual


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_residuals_of_both_sides_split_the_loss(correlated: Moment, rows: int) -> None:
    """`tr(B E A E^T)` is the sum of `tr(D_i eta_ij D_j eta_ij^T)`, `eta = L_B^T E L_A`."""
    A, B, E = correlated(I, 4), low_rank(correlated), normal(O, I, seed=5).double()
    lower, (columns,) = block_ldl(A, [Run(I, 4)])
    whole = O - O % rows
    runs = [Run(whole, rows)] + ([Run(O - whole, O - whole)] if O > whole else [])
    left, blocks = block_ldl(B, runs)
    eta = left.T @ E @ lower
    diagonal = torch.block_diag(*(block for run in blocks for block in run))
    parts = torch.trace(diagonal @ eta @ torch.block_diag(*columns) @ eta.T)
    assert abs(float(parts / torch.trace(B @ E @ A @ E.T)) - 1) < 1e-10


def test_the_passes_leave_the_residuals_of_the_identity(correlated: Moment) -> None:
    A, B = correlated(I, 4), low_rank(correlated)
    weight, _, two, residual = rounded_both(A, B, 32)
    feedback = row_feedback(B, 32)
    damped = factorize(A, [Run(I, 4)], 0.01).matrix
    shaped = feedback.lower.double().T @ (weight - two.value).double()
    assert residual == pytest.approx(form(shaped, damped, None), rel=1e-4)
    assert [block.stop - block.start for block in feedback.blocks] == [32, 32, 16]


def test_without_curvature_between_rows_it_is_the_one_sided_pass(correlated: Moment) -> None:
    _, one, two, _ = rounded_both(correlated(I, 4), 3.0 * torch.eye(O), 32)
    assert torch.equal(one.codes[0][0], two.codes[0][0])
    assert torch.equal(one.value, two.value)


def test_it_lowers_the_loss_and_raises_the_plain_error(correlated: Moment) -> None:
    """If both fell, the comparison would be wrong (memo G, test 11)."""
    A, B = correlated(I, 4), low_rank(correlated)
    weight, one, two, _ = rounded_both(A, B, 8)
    errors = [(weight - state.value).double() for state in (one, two)]
    losses = [form(error, A, B) for error in errors]
    assert losses[1] < 0.8 * losses[0]
    assert float(errors[1].norm()) > float(errors[0].norm())


def test_descent_over_rows_never_raises_the_loss(correlated: Moment) -> None:
    A, B = correlated(I, 4), low_rank(correlated)
    factors = factorize(A, [Run(I, 4)], 0.01)
    weight, _, two, _ = rounded_both(A, B, 8)
    feedback, tables = row_feedback(B, 8), [[normal(256, 4, seed=3)]]
    losses = []
    for _ in range(3):
        losses.append(form((weight - two.value).double(), factors.matrix, feedback.matrix.double()))
        columns = descent_feedback(factors)
        descend_rows(weight, two, tables, columns, feedback, factors.matrix.float())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
    assert torch.equal(two.value, tables[0][0][two.codes[0][0]].view(O, I))
