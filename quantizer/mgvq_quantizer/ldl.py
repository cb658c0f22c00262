"""Damped input second moments and their block factorisation (called by `solver`).

`A = L D L^T` with `L` unit lower triangular in blocks of columns, as wide in each band as its
vectors are long. For any rounding error `E` of a weight matrix, `tr(E A E^T) = sum_k tr(eta_k D_k
eta_k^T)` with `eta = E L`: the loss of a layer splits into one quadratic form a block of columns,
which `rounding` minimises one by one. The last block is rounded first and is compensated by all
blocks before it.
Not here: codebooks, rounding, where the moments come from (`statistics`).

Source: method memo C.4 and C.8; QuIP# (arXiv 2402.04396), LDLQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_ATTEMPTS = 10


class Run(NamedTuple):
    """So many columns side by side, cut into blocks of one width."""

    width: int
    block: int


@dataclass(frozen=True, eq=False)
class BlockLDL:
    """A damped second moment and its factors, all float64."""

    matrix: Tensor
    """`[I, I]`: what was factored, damping included."""
    lower: Tensor
    """`[I, I]`: unit lower triangular in blocks."""
    blocks: tuple[Tensor, ...]
    """`[width/b, b, b]` a run: the diagonal blocks `D_k`, symmetric positive definite."""
    damping: float
    """The share of the mean diagonal that was added, after retries."""


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` times the mean diagonal to the diagonal.

    An input that was zero on every token keeps exactly that much weight, so its column is still
    rounded to its own values and never steers the others. A moment that is zero everywhere
    becomes the identity.

    Args:
        hessian: `[I, I]` symmetric, any float dtype.
        damping: share of the mean of the diagonal, > 0.

    Returns:
        `[I, I]` float64, symmetrised.
    """
    moment = hessian.double()
    moment = (moment + moment.T) / 2
    mean = float(moment.diagonal().mean())
    if mean <= 0.0:
        return torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    moment.diagonal().add_(damping * mean)
    return moment


def block_ldl(matrix: Tensor, runs: Sequence[Run]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Factor a positive definite matrix as `L D L^T` in blocks of columns.

    Args:
        matrix: `[I, I]` float64, symmetric positive definite.
        runs: how the columns are cut, from left to right.

    Returns:
        `L` `[I, I]` with identity diagonal blocks, and `D`, one `[width/b, b, b]` a run.

    Raises:
        torch.linalg.LinAlgError: if the matrix is not positive definite.
        ValueError: if the runs do not cut the columns into whole blocks.
    """
    I = matrix.shape[0]  # noqa: E741
    if sum(run.width for run in runs) != I or any(run.width % run.block for run in runs):
        raise ValueError(f"{list(runs)} do not cut {I} columns into whole blocks")
    cholesky = torch.linalg.cholesky(matrix)
    lower, blocks, start = [], [], 0
    for width, block in runs:
        panels = cholesky[:, start : start + width].reshape(I, -1, block).transpose(0, 1)
        rows = torch.arange(start, start + width, device=matrix.device).view(-1, block)
        numbers = torch.arange(width // block, device=matrix.device)[:, None]
        corners = panels[numbers, rows]  # [width/b, b, b]
        unit = torch.linalg.solve_triangular(corners, panels, upper=False, left=False)
        lower.append(unit.transpose(0, 1).reshape(I, width))
        blocks.append(corners @ corners.transpose(1, 2))
        start += width
    return torch.cat(lower, dim=1), tuple(blocks)


def factorize(hessian: Tensor, runs: Sequence[Run], damping: float) -> BlockLDL:
    """Damp and factor a second moment; double the damping until the factorisation holds.

    Args:
        hessian: `[I, I]` symmetric, finite.
        runs: how the columns are cut into blocks.
        damping: first share of the mean diagonal to add.

    Returns:
        The factors, float64.

    Raises:
        ValueError: if it fails even with `damping * 2**9`.
    """
    attempt = damping
    for _ in range(_MAX_ATTEMPTS):
        matrix = damp(hessian, attempt)
        try:
            lower, blocks = block_ldl(matrix, runs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            attempt *= 2
            continue
        return BlockLDL(matrix, lower, blocks, attempt)
    raise ValueError(
        f"the second moment of {hessian.shape[0]} inputs cannot be factored even with damping "
        f"{attempt / 2:g}: are the calibration activations finite?"
    )
