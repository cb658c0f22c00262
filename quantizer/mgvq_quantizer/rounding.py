"""One pass over the columns of a matrix that turns weights into codes (called by `solver`).

Both passes share one loop: the target of block `j` is `W_j + sum_i E_i K_ij`, where `E = W - Q` is
the error made so far and `K` says how much of block i's error block j can absorb.
- block-LDL rounding: `K = L - I`, metric `D_j`. The sum of the residuals' forms is the loss.
- coordinate descent: `K_ij = A_ij A_jj^-1`, metric `A_jj`. Never raises the loss, needs a start.
Not here: tables (`codebook`), factors (`ldl`), scales (`solver`).

Source: method memo C.4 (one-sided) and D.3 (the descent sweep; QuIP# `quip_tune_iters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_quantizer.codebook import assign
from mgvq_quantizer.ldl import BlockLDL

_BUFFER = 128
"""Columns whose mutual feedback is applied at once; beyond them it is one matmul a buffer."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors travel between blocks, and how a block's own error is measured."""

    coupling: Tensor
    """`[I, I]` float32, zero on the diagonal blocks: `K`."""
    metrics: Tensor
    """`[I/b, b, b]` float32."""


@dataclass(eq=False)
class Rounded:
    """A matrix in codes, before row scales; changed in place by `sweep`."""

    codes: list[Tensor]
    """One `[O, I/d]` int64 a stage."""
    value: Tensor
    """`[O, I]` float32: the decoded codes."""

    def copy(self) -> Rounded:
        """Return a copy that a later sweep cannot change."""
        return Rounded([code.clone() for code in self.codes], self.value.clone())


def ldl_feedback(factors: BlockLDL) -> Feedback:
    """Couplings of block-LDL rounding: errors flow from later to earlier columns."""
    I = factors.lower.shape[0]  # noqa: E741
    eye = torch.eye(I, dtype=torch.float64, device=factors.lower.device)
    return Feedback((factors.lower - eye).float(), factors.blocks.float())


def descent_feedback(factors: BlockLDL) -> Feedback:
    """Couplings of coordinate descent: every block answers to the error of all others."""
    nb, b, _ = factors.blocks.shape
    blocks = factors.matrix.view(nb, b, nb, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    panels = factors.matrix.view(-1, nb, b).transpose(0, 1)  # [I/b, I, b]
    coupling = torch.linalg.solve(blocks, panels.transpose(1, 2))  # [I/b, b, I]
    coupling = coupling.permute(2, 0, 1).reshape(nb * b, nb * b)
    coupling = coupling - torch.eye(nb * b, dtype=torch.float64, device=coupling.device)
    return Feedback(coupling.float(), blocks.float().contiguous())


def empty(weight: Tensor, tables: Sequence[Tensor]) -> Rounded:
    """Return the state before the first pass: no codes chosen, value zero."""
    O, I = weight.shape  # noqa: E741
    codes = [
        torch.zeros(O, I // table.shape[1], dtype=torch.int64, device=weight.device)
        for table in tables
    ]
    return Rounded(codes, torch.zeros_like(weight))


def sweep(
    weight: Tensor,
    rounded: Rounded,
    tables: Sequence[Tensor],
    feedback: Feedback,
    *,
    keep_better: bool = False,
) -> float:
    """Choose the codes of every block once, last block first.

    Args:
        weight: `[O, I]` float32, divided by the row scales.
        rounded: the codes so far; overwritten.
        tables: one `[256, d]` float32 a stage.
        feedback: couplings and metrics of the pass.
        keep_better: keep a row's old codes in a block where the new ones are no better (descent).

    Returns:
        `sum_j tr(eta_j M_j eta_j^T)` over the residuals that were left. For block-LDL rounding this
        equals `tr(E A E^T)`.
    """
    nb, b, _ = feedback.metrics.shape
    error = weight - rounded.value  # [O, I]
    loss = 0.0
    per_buffer = max(1, _BUFFER // b)
    for stop in range(nb, 0, -per_buffer):
        start = max(0, stop - per_buffer)
        columns = slice(start * b, stop * b)
        pull = error @ feedback.coupling[:, columns]  # [O, width]
        before = error[:, columns].clone()
        inner = feedback.coupling[columns, columns]
        for j in range(stop - 1, start - 1, -1):
            here = slice(j * b, (j + 1) * b)
            local = slice((j - start) * b, (j - start + 1) * b)
            change = error[:, columns] - before
            goal = weight[:, here] + pull[:, local] + change @ inner[:, local]
            loss += _round_block(j, goal, rounded, tables, feedback.metrics[j], keep_better)
            error[:, here] = weight[:, here] - rounded.value[:, here]
    return loss


def _round_block(
    j: int,
    goal: Tensor,
    rounded: Rounded,
    tables: Sequence[Tensor],
    metric: Tensor,
    keep_better: bool,
) -> float:
    """Choose block `j`'s codes for the goal `[O, b]`; return the residual's form."""
    b = metric.shape[0]
    here = slice(j * b, (j + 1) * b)
    codes, value = assign(goal, metric, tables)
    form = _form(goal - value, metric)  # [O]
    if keep_better:
        old = _form(goal - rounded.value[:, here], metric)
        better = form < old
        value = torch.where(better[:, None], value, rounded.value[:, here])
        form = torch.minimum(form, old)
    rounded.value[:, here] = value
    for code, chosen in zip(rounded.codes, codes, strict=True):
        width = chosen.shape[1]
        part = slice(j * width, (j + 1) * width)
        code[:, part] = (
            torch.where(better[:, None], chosen, code[:, part]) if keep_better else chosen
        )
    return float(form.double().sum())


def _form(error: Tensor, metric: Tensor) -> Tensor:
    return ((error @ metric) * error).sum(-1)
