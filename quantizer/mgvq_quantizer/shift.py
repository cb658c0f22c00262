"""Where a weight should be rounded to, other than to itself (called by `stream` and `gate`).

Near a trained weight the loss is `<G, D> + c/2 tr(B D A D^T)` in the change `D`. Completing the
square, its rounding is that of the target `W - 1/c B^-1 G A^-1` with the curvature alone, so a
gradient needs no other recursion than a shifted target. A measured gradient is mostly noise: it is
used only where it stands out, coordinate by coordinate in the eigenbasis of the curvature, and only
up to a share of the rounding error. The mismatch between the inputs of the original and those of
the half-quantized model is a regression and needs no threshold.
Not here: curvature and gradients (`curvature`), what inputs miss (`original_blocks`), whether a
gradient's shift is used at all (`gate`).

Source: method memo C.2, C.3(3), C.5; GPTAQ (Intelligent-Computing-Lab-Yale/GPTAQ) for the mismatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_quantizer.curvature import SampleGradients
from mgvq_quantizer.original_blocks import Missing


@dataclass(frozen=True, eq=False)
class Basis:
    """The eigenbasis of `c (B x A)`, float64."""

    rows: Tensor
    """`[O, O]`: eigenvectors of B, in columns."""
    columns: Tensor
    """`[I, I]`: eigenvectors of A, in columns."""
    stiffness: Tensor
    """`[O, I]`: eigenvalues `c b a^T`, positive."""

    def coordinates(self, matrix: Tensor) -> Tensor:
        """Return a matrix `[O, I]` in the eigenbasis."""
        return self.rows.T @ matrix @ self.columns

    def norm(self, change: Tensor) -> float:
        """Return `sqrt(c tr(B D A D^T))` of a change `[O, I]`."""
        coordinates = self.coordinates(change.double())
        return math.sqrt(float((self.stiffness * coordinates.square()).sum()))


def kronecker_basis(A: Tensor, B: Tensor, scale: float) -> Basis:
    """Diagonalise the curvature.

    Args:
        A: `[I, I]` symmetric positive definite (damped).
        B: `[O, O]` symmetric positive definite (shrunk).
        scale: `c`, > 0.
    """
    a, columns = torch.linalg.eigh(A.double())
    b, rows = torch.linalg.eigh(B.double())
    return Basis(rows, columns, scale * b[:, None] * a)


def gradient_shift(gradients: SampleGradients, basis: Basis, threshold: float) -> Tensor:
    """Return the step to the minimum of the loss, along the directions that stand out of the noise.

    In the eigenbasis, each whitened coordinate `z` of the mean gradient loses `threshold *
    sqrt(2 ln(O I))` of its standard errors, and is zero below that.

    Args:
        gradients: of the divergence from the original model, one matrix.
        basis: of the curvature.
        threshold: 1 is the universal threshold, 0 takes the gradient as it is.

    Returns:
        `[O, I]` float64: what to add to the weight.

    Source: method memo C.5.
    """
    rows, columns = basis.rows, basis.columns
    total = torch.zeros_like(basis.stiffness)
    squares = torch.zeros_like(basis.stiffness)
    for x, g in gradients.pairs():
        turned = ((g @ rows.to(g)).T @ (x @ columns.to(x))).double()  # [O, I]
        total += turned
        squares += turned.square()
    mean = total / len(gradients)
    error = squares.sqrt() / len(gradients)  # of the mean, around zero
    cut = threshold * math.sqrt(2 * math.log(mean.numel())) * error
    # Whitening divides signal and noise alike, so the threshold may come first.
    kept = mean.sign() * (mean.abs() - cut).clamp_min(0.0)
    return -(rows @ (kept / basis.stiffness) @ columns.T)


def within(shift: Tensor, error: Tensor, basis: Basis, radius: float) -> Tensor:
    """Scale a shift down to at most `radius` times a rounding error, in the curvature's norm.

    Args:
        shift: `[O, I]`.
        error: `[O, I]`: of the weight that was rounded without the shift.
        basis: of the curvature.
        radius: the trust radius, as a share.
    """
    length = basis.norm(shift)
    limit = radius * basis.norm(error)
    return shift * (limit / length) if length > limit else shift


def mismatch_shift(weight: Tensor, missing: Missing, A: Tensor, share: float) -> Tensor:
    """Return what makes a weight answer to the inputs it gets as it did to those it should get.

    Where its outputs are added to a stream, it makes up for what that misses too.

    Args:
        weight: `[O, I]`.
        missing: along the inputs `xh` it gets: `C` of the inputs, `S` of the stream.
        A: `[I, I]`: the mean of `xh xh^T`, damped.
        share: how much of it to take; 1 is the least-squares answer.

    Returns:
        `share * (W C + S) A^-1` `[O, I]` float64.

    Source: method memo C.3(3), without the stream.
    """
    product = weight.double() @ missing.inputs.double()  # [O, I]
    if missing.stream is not None:
        product += missing.stream
    return share * torch.linalg.solve(A.double(), product.T).T
