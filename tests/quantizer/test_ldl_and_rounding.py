"""Factorisation, the loss identity, GPTQ as a special case, and the order of columns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mgvq_kernels import ops
from mgvq_quantizer.codebook import decode
from mgvq_quantizer.ldl import Run, block_ldl, damp, factorize
from mgvq_quantizer.rounding import descent_feedback, empty, ldl_feedback, sweep

Moment = Callable[[int, int], torch.Tensor]


def proxy(weight: torch.Tensor, value: torch.Tensor, moment: torch.Tensor) -> float:
    error = (weight - value).double()
    return float(((error @ moment.double()) * error).sum())


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_factors_multiply_to_the_matrix_and_split_the_loss(correlated: Moment, block: int) -> None:
    matrix = damp(correlated(64, 0), 0.01)
    lower, blocks = block_ldl(matrix, [Run(64, block)])
    assert torch.allclose(
        lower @ torch.block_diag(*blocks[0]) @ lower.T, matrix, rtol=0, atol=1e-12
    )
    for i in range(0, 64, block):
        assert torch.equal(
            lower[i : i + block, i + block :], torch.zeros(block, 64 - i - block).double()
        )
        eye = torch.eye(block, dtype=torch.float64)
        assert torch.allclose(lower[i : i + block, i : i + block], eye, rtol=0, atol=1e-12)
    error = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    residual = (error @ lower).view(7, -1, block).transpose(0, 1)
    parts = torch.einsum("bri,bij,brj->", residual, blocks[0], residual)
    assert abs(float(parts) / float(torch.trace(error @ matrix @ error.T)) - 1) < 1e-10


def test_blocks_of_different_width_split_the_loss_too(correlated: Moment) -> None:
    matrix = damp(correlated(96, 8), 0.01)
    runs = [Run(32, 8), Run(32, 1), Run(32, 4)]
    lower, blocks = block_ldl(matrix, runs)
    diagonal = torch.block_diag(*(block for run in blocks for block in run))
    assert torch.allclose(lower @ diagonal @ lower.T, matrix, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="whole blocks"):
        block_ldl(matrix, [Run(92, 8), Run(4, 4)])
    with pytest.raises(ValueError, match="whole blocks"):
        block_ldl(matrix, runs[:2])


def test_feedback_crosses_bands(correlated: Moment) -> None:
    """Two bands with equal tables are rounded as one band, and their residuals sum to the loss."""
    g = torch.Generator().manual_seed(9)
    weight, table = torch.randn(48, 192, generator=g), torch.randn(256, 4, generator=g)
    one = factorize(correlated(192, 9), [Run(192, 4)], 0.01)
    two = factorize(correlated(192, 9), [Run(64, 4), Run(128, 4)], 0.01)
    whole = empty(weight, [[table]], [192])
    parts = empty(weight, [[table], [table]], [64, 128])
    for feedback in (ldl_feedback, descent_feedback):
        keep = feedback is descent_feedback
        sweep(weight, whole, [[table]], feedback(one), keep_better=keep)
        residual = sweep(weight, parts, [[table], [table]], feedback(two), keep_better=keep)
        assert torch.equal(torch.cat([band[0] for band in parts.codes], 1), whole.codes[0][0])
        if not keep:
            expected = proxy(weight, parts.value, two.matrix)
            assert residual == pytest.approx(expected, rel=1e-4)


def test_damping_is_raised_until_the_factorisation_holds() -> None:
    direction = torch.ones(8, 1, dtype=torch.float64)
    singular = direction @ direction.T - 0.02 * torch.eye(8, dtype=torch.float64)
    factors = factorize(singular, [Run(8, 4)], 0.01)
    assert factors.damping == pytest.approx(0.04)
    with pytest.raises(ArithmeticError, match="cannot be factored"):
        factorize(torch.full((8, 8), float("nan"), dtype=torch.float64), [Run(8, 4)], 0.01)


def test_a_dead_input_neither_fails_nor_steers_the_others(correlated: Moment) -> None:
    moment = correlated(16, 2)
    moment[3] = moment[:, 3] = 0.0
    factors = factorize(moment, [Run(16, 1)], 0.01)
    coupling = ldl_feedback(factors).coupling
    assert torch.equal(coupling[3], torch.zeros(16))
    assert torch.equal(coupling[:, 3], torch.zeros(16))
    zero = factorize(torch.zeros(8, 8), [Run(8, 4)], 0.01)
    assert torch.equal(zero.matrix, torch.eye(8, dtype=torch.float64))


def uniform_table(step: float) -> torch.Tensor:
    """16 steps in the middle; the other entries are too far away to be chosen."""
    table = torch.full((256, 1), 1e4)
    table[:16, 0] = (torch.arange(16) - 7.5) * step
    return table


def gptq(weight: torch.Tensor, moment: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """GPTQ as published: left to right, with the Cholesky factor of the inverse."""
    work, codes = weight.double().clone(), []
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    for j in range(work.shape[1]):
        code = (work[:, j, None] - table[:, 0].double()).abs().argmin(1)
        error = (work[:, j] - table[code, 0].double()) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
        codes.append(code)
    return torch.stack(codes, 1)


def test_scalar_grid_gives_the_codes_of_gptq(correlated: Moment) -> None:
    weight = torch.randn(32, 160, generator=torch.Generator().manual_seed(3))
    factors = factorize(correlated(160, 3), [Run(160, 1)], 0.01)
    table = uniform_table(0.4)
    rounded = empty(weight, [[table]], [160])
    sweep(weight, rounded, [[table]], ldl_feedback(factors))
    expected = gptq(weight.flip(1), factors.matrix.flip(0, 1), table).flip(1)
    assert (rounded.codes[0][0] == expected).double().mean() > 0.999


def test_residuals_add_up_and_descent_never_raises_the_loss(correlated: Moment) -> None:
    g = torch.Generator().manual_seed(4)
    weight, table = torch.randn(48, 192, generator=g), torch.randn(256, 4, generator=g)
    factors = factorize(correlated(192, 4), [Run(192, 4)], 0.01)
    rounded = empty(weight, [[table]], [192])
    residual = sweep(weight, rounded, [[table]], ldl_feedback(factors))
    losses = [proxy(weight, rounded.value, factors.matrix)]
    assert residual == pytest.approx(losses[0], rel=1e-4)
    plain = torch.cdist(weight.view(-1, 4), table).argmin(1)
    assert losses[0] < proxy(weight, table[plain].view(48, 192), factors.matrix)
    for _ in range(3):
        sweep(weight, rounded, [[table]], descent_feedback(factors), keep_better=True)
        losses.append(proxy(weight, rounded.value, factors.matrix))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
    assert torch.equal(rounded.value, table[rounded.codes[0][0]].view(48, 192))


@pytest.mark.parametrize("kept", [1.0, 0.7])
@pytest.mark.parametrize("dims", [(8,), (4,), (2,), (1,), (4, 8), (8, 8)])
def test_compiled_code_chooses_as_torch_does(
    correlated: Moment, dims: tuple[int, ...], kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding, then descent, over several buffers; on one thread and on two, bit for bit."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(96, 192, generator=g)
    tables = [torch.randn(256, d, generator=g) / (stage + 1) for stage, d in enumerate(dims)]
    factors = factorize(correlated(192, 6), [Run(192, max(dims))], 0.01)

    def run(compiled: bool, threads: int) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(ops, "has_numba", lambda: compiled)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        rounded = empty(weight, [tables], [192])
        losses = [sweep(weight, rounded, [tables], ldl_feedback(factors), kept=[kept])]
        losses += [
            sweep(weight, rounded, [tables], descent_feedback(factors), keep_better=True)
            for _ in range(2)
        ]
        return losses, torch.cat(rounded.codes[0], dim=1), rounded.value

    losses, codes, value = run(compiled=True, threads=1)
    assert torch.equal(value, decode([codes_of(codes, dims)], [tables]))
    again, codes_again, _ = run(compiled=True, threads=2)
    assert (losses, codes.tolist()) == (again, codes_again.tolist())
    expected, plain_codes, _ = run(compiled=False, threads=1)
    # A tie within float32 sends the rest of its row another way.
    assert (codes == plain_codes).float().mean() > (0.98 if kept == 1.0 else 0.97)
    assert losses == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("dims", [(4,), (4, 8), (8, 8)])
def test_what_is_no_number_still_gets_a_code(correlated: Moment, dims: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(40, 64, generator=g)
    weight[3] = torch.nan
    tables = [torch.randn(256, d, generator=g) for d in dims]
    rounded = empty(weight, [tables], [64])
    factors = factorize(correlated(64, 7), [Run(64, max(dims))], 0.01)
    assert math.isnan(sweep(weight, rounded, [tables], ldl_feedback(factors)))
    assert all(0 <= int(code.min()) and int(code.max()) < 256 for code in rounded.codes[0])
    assert bool(rounded.value.isfinite().all())


def codes_of(codes: torch.Tensor, dims: tuple[int, ...]) -> list[torch.Tensor]:
    return list(torch.split(codes, [192 // d for d in dims], dim=1))


def test_rounding_sensitive_channels_last_is_worse(correlated: Moment) -> None:
    g = torch.Generator().manual_seed(5)
    weight, table = torch.randn(64, 128, generator=g), torch.randn(256, 4, generator=g)
    moment = correlated(128, 5)

    def loss(order: torch.Tensor) -> float:
        factors = factorize(moment[order][:, order], [Run(128, 4)], 0.01)
        rounded = empty(weight, [[table]], [128])
        sweep(weight[:, order], rounded, [[table]], ldl_feedback(factors))
        return proxy(weight[:, order], rounded.value, factors.matrix)

    ascending = moment.diagonal().argsort()
    assert loss(ascending) < 0.9 * loss(ascending.flip(0))
