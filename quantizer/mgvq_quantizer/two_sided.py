"""Rounding whose errors also flow between rows (called by `solver`).

With a curvature on both sides the loss is `tr(B E A E^T)`. Rows are taken in blocks, from the
bottom up. Factored as `B = L D L^T`, a block of rows that carries `U_i = sum_(r > i) L_ri^T E_r` is
rounded like any matrix, its target being `W_i + U_i`: the residual of that one-sided rounding is
then `L_B^T E L_A`, whose forms add up to the loss. Coordinate descent over blocks of rows works
alike, with `B_ii^-1 sum_(r != i) B_ir E_r`. Inside a block of rows, codes are chosen row by row.
With `B = 1` nothing is carried, and both are the passes of `rounding`.

Source: method memo C.4; YAQA (Cornell-RelaxML/yaqa).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_quantizer.codebook import Tables
from mgvq_quantizer.ldl import Run, block_ldl
from mgvq_quantizer.rounding import Feedback, Rounded, sweep

ROWS = 64
"""Rows of a block: fewer follow `B` more closely and take more steps (memo C.4)."""


@dataclass(frozen=True, eq=False)
class RowFeedback:
    """How errors travel between rows."""

    matrix: Tensor
    """`[O, O]` float32: `B`, its mean diagonal 1."""
    lower: Tensor
    """`[O, O]` float32: unit lower triangular in blocks of rows."""
    blocks: tuple[slice, ...]
    """The blocks of rows, from the top."""


def row_feedback(B: Tensor, rows: int = ROWS) -> RowFeedback:
    """Factor the output side of a curvature.

    Args:
        B: `[O, O]` symmetric positive definite (shrunk), of any scale.
        rows: of a block; the last block takes what is left.

    Raises:
        torch.linalg.LinAlgError: if `B` is not positive definite.
    """
    O = len(B)  # noqa: E741
    matrix = B.double() / B.double().diagonal().mean()
    left = O % rows
    runs = [Run(O - left, rows)] * (O > left) + [Run(left, left)] * (left > 0)
    lower, _ = block_ldl(matrix, runs)
    blocks = tuple(slice(start, min(start + rows, O)) for start in range(0, O, rows))
    return RowFeedback(matrix.float(), lower.float(), blocks)


def round_rows(
    weight: Tensor,
    rounded: Rounded,
    tables: Tables,
    columns: Feedback,
    rows: RowFeedback,
    kept: Sequence[float] = (),
) -> float:
    """Choose all codes once, from the last block of rows and columns to the first.

    Args:
        weight: `[O, I]` float32, divided by the row scales.
        rounded: the codes so far; overwritten.
        tables: [band][stage] `[256, d]` float32.
        columns: of `ldl_feedback`.
        rows: feedback between rows.
        kept: as in `sweep`.

    Returns:
        `tr(F A F^T)` with `F = L_B^T E`: the sum of the residuals' forms.
    """
    loss = 0.0
    error = torch.zeros_like(weight)
    for block in reversed(rows.blocks):
        carried = rows.lower[block.stop :, block].T @ error[block.stop :]
        part = _rows(rounded, block)
        loss += sweep(weight[block] + carried, part, tables, columns, kept=kept)
        error[block] = weight[block] - part.value
    return loss


def descend_rows(
    weight: Tensor,
    rounded: Rounded,
    tables: Tables,
    columns: Feedback,
    rows: RowFeedback,
    A: Tensor,
) -> None:
    """Choose the codes of each block of rows again where that lowers `tr(B E A E^T)`.

    Args:
        weight: `[O, I]` float32, divided by the row scales.
        rounded: the codes so far; changed in place.
        tables: [band][stage] `[256, d]` float32.
        columns: of `descent_feedback`.
        rows: feedback between rows.
        A: `[I, I]` float32.
    """
    error = weight - rounded.value
    for block in reversed(rows.blocks):
        own = rows.matrix[block, block]
        pull = rows.matrix[block] @ error - own @ error[block]
        target = weight[block] + torch.linalg.solve(own, pull)
        part = _rows(rounded, block)
        trial = part.copy()
        sweep(target, trial, tables, columns, keep_better=True)
        if form(target - trial.value, A, own) < form(target - part.value, A, own):
            part.take(trial)
            error[block] = weight[block] - part.value


def form(error: Tensor, A: Tensor, B: Tensor | None) -> float:
    """Return `tr(B E A E^T)` of an error `[O, I]`; without `B`, `tr(E A E^T)`."""
    image = error @ A
    return float((image * (error if B is None else B @ error)).double().sum())


def _rows(rounded: Rounded, block: slice) -> Rounded:
    """A view of some rows: changes of it are changes of the whole."""
    codes = [[code[block] for code in band] for band in rounded.codes]
    return Rounded(codes, rounded.value[block])
