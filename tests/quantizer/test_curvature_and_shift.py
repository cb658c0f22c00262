"""Curvature from sampled gradients, and shifted targets, against answers known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mgvq_quantizer.curvature import SampleGradients, kronecker_scale, output_factor
from mgvq_quantizer.original_blocks import Missing
from mgvq_quantizer.shift import gradient_shift, kronecker_basis, mismatch_shift, within

Moment = Callable[[int, int], Tensor]
O, I = 12, 16  # noqa: E741


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_samples(matrices: Tensor) -> SampleGradients:
    """Gradients `[S, O, I]`, each as the product of its two sides."""
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype)
    return SampleGradients(tuple(matrices), (eye,) * len(matrices))


def loss(change: Tensor, G: Tensor, A: Tensor, B: Tensor, c: float) -> float:
    """`<G, D> + c/2 tr(B D A D^T)`, by the Kronecker product written out."""
    D = change.reshape(-1)
    return float(G.reshape(-1) @ D + c / 2 * D @ torch.kron(B, A) @ D)


@pytest.fixture
def factors(correlated: Moment) -> tuple[Tensor, Tensor]:
    A, B = correlated(I, 0), correlated(O, 1)
    return A + 0.05 * torch.eye(I), B + 0.05 * torch.eye(O)


def test_gradients_of_tokens_are_those_of_autograd() -> None:
    x, weight = normal(7, I, seed=0), normal(O, I, seed=1).requires_grad_()
    y = x @ weight.T
    wanted, g = torch.autograd.grad(y.tanh().sum(), (weight, y))
    gradients = SampleGradients((x, x), (g, 3 * g))
    assert len(gradients) == 2
    change = normal(O, I, seed=2)
    expected = torch.stack([(wanted * change).sum(), 3 * (wanted * change).sum()])
    assert torch.allclose(gradients.products(change), expected, rtol=1e-12)
    second = (wanted @ wanted.T) * (1 + 9) / 2 / I
    assert torch.allclose(output_factor(gradients, 0.0), second, rtol=1e-10)
    shrunk = output_factor(gradients, 0.25)
    assert torch.allclose(shrunk.diagonal().mean(), second.diagonal().mean())
    assert torch.allclose(shrunk[0, 1:], 0.75 * second[0, 1:], rtol=1e-10)
    whole = output_factor(gradients, 1.0)
    assert torch.allclose(whole, whole[0, 0] * torch.eye(O, dtype=torch.float64), atol=0)
    silent = SampleGradients((x,), (torch.zeros_like(g),))
    assert torch.equal(output_factor(silent, 0.2), torch.eye(O, dtype=torch.float64))


def test_factors_and_scale_recover_the_curvature_of_sampled_gradients(
    factors: tuple[Tensor, Tensor],
) -> None:
    """`E[vec G vec G^T] = B x A`, so the factors times `c` must give that back within 5 %."""
    A, B = factors
    left, right = torch.linalg.cholesky(B), torch.linalg.cholesky(A)
    gradients = as_samples(left @ normal(4000, O, I, seed=3) @ right.T)
    seen = output_factor(gradients, 0.0)
    both = sum(x.T @ x for x, _ in gradients.pairs()) / (len(gradients) * O)
    for factor in (1.0, 7.0):  # whatever the factors' own scale
        c = kronecker_scale(gradients, factor * both, seen)
        error = c * torch.kron(seen, factor * both) - torch.kron(B, A)
        assert float(error.norm() / torch.kron(B, A).norm()) < 0.05


def test_a_shift_by_the_true_gradient_takes_the_whole_gain(
    factors: tuple[Tensor, Tensor],
) -> None:
    """Without rounding and noise the loss falls by half the squared norm of the shift."""
    (A, B), c, G = factors, 0.3, normal(O, I, seed=4)
    basis = kronecker_basis(A, B, c)
    shift = gradient_shift(as_samples(G[None]), basis, 0.0)
    assert torch.allclose(shift, -torch.linalg.inv(B) @ G @ torch.linalg.inv(A) / c, rtol=1e-9)
    gain = float(basis.norm(shift)) ** 2 / 2
    assert loss(shift, G, A, B, c) == pytest.approx(-gain, rel=1e-10)
    assert loss(shift + 1e-3 * normal(O, I, seed=5), G, A, B, c) > -gain


def test_completing_the_square_and_the_rest_of_the_columns(
    factors: tuple[Tensor, Tensor],
) -> None:
    """C.2: rounding the shifted target is the whole loss, and its feedback that of the gradient."""
    (A, B), G = factors, normal(O, I, seed=6)
    star = gradient_shift(as_samples(G[None]), kronecker_basis(A, B, 1.0), 0.0)
    change, zero = normal(O, I, seed=7), torch.zeros(O, I, dtype=torch.float64)
    square = loss(change - star, zero, A, B, 1.0) - loss(star, zero, A, B, 1.0)
    assert loss(change, G, A, B, 1.0) == pytest.approx(square, rel=1e-10)
    done, rest = slice(0, 5), slice(5, I)
    pulled = torch.linalg.solve(B, G[:, rest]) + change[:, done] @ A[done, rest]
    best = -pulled @ torch.linalg.inv(A[rest, rest])
    error = change[:, done] - star[:, done]
    fed = star[:, rest] - error @ A[done, rest] @ torch.linalg.inv(A[rest, rest])
    assert torch.allclose(best, fed, rtol=1e-9)
    inverse = torch.linalg.inv(A)
    surgeon = star + error @ torch.linalg.inv(inverse[done, done]) @ inverse[done]
    assert torch.allclose(surgeon[:, rest], best, rtol=1e-9)


def test_only_what_stands_out_of_the_noise_moves_the_target(
    factors: tuple[Tensor, Tensor],
) -> None:
    A, B = factors
    basis = kronecker_basis(A, B, 1.0)
    noise = normal(64, O, I, seed=8)
    assert not bool(gradient_shift(as_samples(noise), basis, 1.5).any())
    raw = gradient_shift(as_samples(noise), basis, 0.0)
    assert loss(raw, torch.zeros(O, I, dtype=torch.float64), A, B, 1.0) > 0.1
    signal = torch.zeros(O, I, dtype=torch.float64)
    signal[2, 3] = -2.0
    G = basis.rows @ signal @ basis.columns.T
    shift = gradient_shift(as_samples(noise + G), basis, 1.0)
    moved = basis.coordinates(shift).abs() > 1e-12
    assert moved.nonzero().tolist() == [[2, 3]]
    assert float(basis.coordinates(shift)[2, 3]) > 0
    assert loss(shift, G, A, B, 1.0) < min(0.0, loss(raw, G, A, B, 1.0))


def test_the_trust_radius_is_a_share_of_the_rounding_error(
    factors: tuple[Tensor, Tensor],
) -> None:
    basis = kronecker_basis(*factors, 2.0)
    shift, error = normal(O, I, seed=9), normal(O, I, seed=10)
    expected = (2.0 * torch.trace(factors[1] @ shift @ factors[0] @ shift.T)).sqrt()
    assert basis.norm(shift) == pytest.approx(float(expected), rel=1e-10)
    short = within(shift, error, basis, 0.25)
    assert basis.norm(short) == pytest.approx(0.25 * basis.norm(error), rel=1e-10)
    assert torch.equal(within(shift, error, basis, 1e3), shift)


def test_the_mismatch_shift_is_least_squares() -> None:
    weight, x = normal(O, I, seed=11), normal(300, I, seed=12)
    seen = x + 0.3 * normal(300, I, seed=13)
    A, cross = seen.T @ seen / 300, (x - seen).T @ seen / 300
    best = torch.linalg.lstsq(seen, x @ weight.T).solution.T
    missing = Missing(cross, None)
    shifts = [mismatch_shift(weight, missing, A, share) for share in (0.0, 0.5, 1.0)]
    assert torch.allclose(weight + shifts[2], best, rtol=1e-8)
    errors = [float((x @ weight.T - seen @ (weight + s).T).norm()) for s in shifts]
    assert all(more < less for less, more in itertools.pairwise(errors))
    stream = seen @ normal(I, O, seed=14) + normal(300, O, seed=15)
    best = torch.linalg.lstsq(seen, x @ weight.T + stream).solution.T
    missing = Missing(cross, stream.T @ seen / 300)
    assert torch.allclose(weight + mismatch_shift(weight, missing, A, 1.0), best, rtol=1e-8)
