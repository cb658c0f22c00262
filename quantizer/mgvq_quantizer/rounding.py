"""One pass over the columns of a matrix that turns weights into codes (called by `solver`).

Both passes share one loop: the target of block `j` is `W_j + sum_i E_i K_ij`, where `E = W - Q` is
the error made so far and `K` says how much of block i's error block j can absorb.
The blocks of a band are as wide as its longest vector; bands follow each other like blocks.
- block-LDL rounding: `K = L - I`, metric `D_j`. The sum of the residuals' forms is the loss.
- coordinate descent: `K_ij = A_ij A_jj^-1`, metric `A_jj`. Never raises the loss, needs a start.
Not here: tables (`codebook`), factors (`ldl`), scales (`solver`), feedback between rows
(`two_sided`).

Source: method memo C.4 (one-sided) and D.3 (the descent sweep; QuIP# `quip_tune_iters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import Band, VQLayout
from mgvq_kernels.trellis import GROUP_WEIGHTS
from mgvq_quantizer.block_codes import FINALISTS, assign
from mgvq_quantizer.codebook import Tables, compiled_search
from mgvq_quantizer.ldl import BlockLDL, Run
from mgvq_quantizer.trellis_search import assign_trellis, whole_segments

_KEPT_BY_LOOKUPS = {1: 0.69, 2: 0.905, 3: 0.973, 4: 0.991}
"""By rate, of normal values in tables trained on them; 8 bits keep all."""
BUFFER = 64
"""Columns whose mutual feedback is applied at once; beyond them it is one matmul a buffer."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors travel between blocks, and how a block's own error is measured."""

    coupling: Tensor
    """`[I, I]` float32, zero on the diagonal blocks: `K`."""
    metrics: tuple[Tensor, ...]
    """`[width/b, b, b]` float32 a band."""


@dataclass(eq=False)
class Rounded:
    """A matrix in codes, before row scales; changed in place by `sweep`."""

    codes: list[list[Tensor]]
    """[band][stage]: `[O, width/d]` int64."""
    value: Tensor
    """`[O, I]` float32: the decoded codes."""

    def copy(self) -> Rounded:
        """Return a copy that a later sweep cannot change."""
        codes = [[code.clone() for code in band] for band in self.codes]
        return Rounded(codes, self.value.clone())

    def take(self, other: Rounded) -> None:
        """Become equal to another state of the same matrix, in place."""
        self.value.copy_(other.value)
        for mine, theirs in zip(self.codes, other.codes, strict=True):
            for code, new in zip(mine, theirs, strict=True):
                code.copy_(new)


def block_of(band: Band) -> int:
    """Return the columns of a band's block: its longest vector, or a trellis's group."""
    if band.stages[0].codec == "trellis":
        return GROUP_WEIGHTS
    return max(stage.vector_dim for stage in band.stages)


def blocks_of(layout: VQLayout) -> list[Run]:
    """Cut every band into its blocks."""
    return [Run(band.width, block_of(band)) for band in layout.bands]


def ldl_feedback(factors: BlockLDL) -> Feedback:
    """Couplings of block-LDL rounding: errors flow from later to earlier columns."""
    I = factors.lower.shape[0]  # noqa: E741
    eye = torch.eye(I, dtype=torch.float64, device=factors.lower.device)
    return Feedback((factors.lower - eye).float(), tuple(D.float() for D in factors.blocks))


def descent_feedback(factors: BlockLDL) -> Feedback:
    """Couplings of coordinate descent: every block answers to the error of all others."""
    I = factors.matrix.shape[0]  # noqa: E741
    couplings, metrics, start = [], [], 0
    for nb, b, _ in (D.shape for D in factors.blocks):
        here = slice(start, start + nb * b)
        square = factors.matrix[here, here].reshape(nb, b, nb, b)
        blocks = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [nb, b, b]
        panels = factors.matrix[:, here].reshape(I, nb, b).transpose(0, 1)  # [nb, I, b]
        coupling = torch.linalg.solve(blocks, panels.transpose(1, 2))  # [nb, b, I]
        couplings.append(coupling.permute(2, 0, 1).reshape(I, nb * b))
        metrics.append(blocks.float().contiguous())
        start += nb * b
    eye = torch.eye(I, dtype=torch.float64, device=factors.matrix.device)
    return Feedback((torch.cat(couplings, dim=1) - eye).float(), tuple(metrics))


def kept_shares(layout: VQLayout, draw_out: float) -> list[float]:
    """Return [band] what its tables are drawn out by the inverse of: 1 where they are not.

    By least squares a code reproduces a value smaller than it is: its regression on the value has
    a slope `s` of one less the distortion. Drawn out by `s^-p`, and with goals divided by `s^p`
    before codes are looked for, the slope is `s^(1-p)`. All the way, the squared error is `1/s`
    times as large; half-way, a quarter of that is added.

    Args:
        layout: the bands.
        draw_out: `p`, of the recipe.
    """
    rates = [band.rate for band in layout.bands]
    if layout.codec == "trellis":
        shares = [1 - 4.0**-rate for rate in rates]
    else:
        shares = [_KEPT_BY_LOOKUPS.get(rate, 1.0) for rate in rates]
    return [share**draw_out for share in shares]


def empty(weight: Tensor, tables: Tables, widths: Sequence[int]) -> Rounded:
    """Return the state before the first pass: no codes chosen, value zero.

    Args:
        weight: `[O, I]`.
        tables: [band][stage] `[256, d]`.
        widths: columns of each band.
    """
    O = weight.shape[0]  # noqa: E741
    codes = [
        [
            torch.zeros(O, width // table.shape[1], dtype=torch.int64, device=weight.device)
            for table in band
        ]
        for band, width in zip(tables, widths, strict=True)
    ]
    return Rounded(codes, torch.zeros_like(weight))


def sweep(
    weight: Tensor,
    rounded: Rounded,
    tables: Tables,
    feedback: Feedback,
    *,
    keep_better: bool = False,
    rates: Sequence[int] = (),
    kept: Sequence[float] = (),
) -> float:
    """Choose the codes of every block once, last block first.

    Args:
        weight: `[O, I]` float32, divided by the row scales.
        rounded: the codes so far; overwritten.
        tables: [band][stage] `[256, d]` float32.
        feedback: couplings and metrics of the pass.
        keep_better: keep a row's old codes in a block where the new ones are no better (descent);
            those of a whole segment of rows where codes are a trellis.
        rates: [band]: the bits a weight of a trellis, 0 for lookups; empty stands for lookups only.
        kept: [band]: of `kept_shares`, if tables are drawn out by them; empty if they are not.

    Returns:
        `sum_j tr(eta_j M_j eta_j^T)` over the residuals that were left. For block-LDL rounding this
        equals `tr(E A E^T)`.
    """
    error = weight - rounded.value  # [O, I]
    loss = 0.0
    end = weight.shape[1]
    compiled = weight.is_cpu and ops.has_numba()
    rates, kept = rates or [0] * len(tables), kept or [1.0] * len(tables)
    for codes, books, metrics, rate, share in zip(
        *map(reversed, (rounded.codes, tables, feedback.metrics, rates, kept)), strict=True
    ):
        nb, b, _ = metrics.shape
        first = end - nb * b
        compile_it = compiled and not rate
        stages = compiled_search().Stages.of_band(books, metrics) if compile_it else None
        per_buffer = max(1, BUFFER // b)
        for stop in range(nb, 0, -per_buffer):
            blocks = range(max(0, stop - per_buffer), stop)
            columns = slice(first + blocks.start * b, first + stop * b)
            inner = feedback.coupling[columns, columns]
            buffer = _Buffer(
                weight[:, columns],
                weight[:, columns] + error @ feedback.coupling[:, columns],
                rounded.value[:, columns],
                error[:, columns],
                [_vectors_of(code, blocks, nb) for code in codes],
            )
            if stages is None:
                loss += _choose(buffer, blocks, inner, books, metrics, keep_better, rate, share)
            else:
                loss += _choose_compiled(buffer, blocks, inner, stages, keep_better, share)
        end = first
    return loss


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Some blocks of one band: views of the matrix's own, changed in place."""

    weight: Tensor
    """`[O, w]`."""
    goal: Tensor
    """`[O, w]`: weights and what the blocks that are done pass on to them; not a view."""
    value: Tensor
    """`[O, w]`."""
    error: Tensor
    """`[O, w]`: weights less values."""
    codes: list[Tensor]
    """One `[O, w/d]` int64 a stage."""


def _vectors_of(code: Tensor, blocks: range, all_blocks: int) -> Tensor:
    """The part of a stage's codes that lies in some blocks: a view."""
    each = code.shape[1] // all_blocks
    return code[:, blocks.start * each : blocks.stop * each]


def _choose_compiled(
    buffer: _Buffer, blocks: range, inner: Tensor, stages: Any, keep_better: bool, kept: float
) -> float:
    """Choose the codes of a buffer, last block first, in compiled code."""
    O = len(buffer.weight)  # noqa: E741
    by_block = [code.reshape(O, len(blocks), -1) for code in buffer.codes]
    codes = torch.cat(by_block, dim=2).contiguous()  # [O, blocks, vectors]
    forms = stages.choose(
        blocks.start, buffer, inner, codes, FINALISTS, kept, keep_better=keep_better
    )
    chosen = torch.split(codes, [part.shape[2] for part in by_block], dim=2)
    for code, new in zip(buffer.codes, chosen, strict=True):
        code.copy_(new.reshape(O, -1))
    return float(forms.sum())


def _choose(
    buffer: _Buffer,
    blocks: range,
    inner: Tensor,
    tables: Sequence[Tensor],
    metrics: Tensor,
    keep_better: bool,
    rate: int,
    kept: float,
) -> float:
    """Choose the codes of a buffer, last block first; return the sum of the forms."""
    b = metrics.shape[1]
    loss = 0.0
    for j in reversed(range(len(blocks))):
        here, ahead = slice(j * b, (j + 1) * b), slice(0, j * b)
        value = buffer.value[:, here]
        codes = [_vectors_of(code, range(j, j + 1), len(blocks)) for code in buffer.codes]
        metric = metrics[blocks[j]]
        goal = buffer.goal[:, here]
        loss += _round_block(goal, codes, value, tables, metric, keep_better, rate, kept)
        left = buffer.weight[:, here] - value
        buffer.goal[:, ahead].addmm_(left - buffer.error[:, here], inner[here, ahead])
        buffer.error[:, here] = left
    return loss


def _round_block(
    goal: Tensor,
    codes: Sequence[Tensor],
    value: Tensor,
    tables: Sequence[Tensor],
    metric: Tensor,
    keep_better: bool,
    rate: int,
    kept: float,
) -> float:
    """Choose codes and value of a block for the goal `[O, b]`; return its form."""
    sought = goal / kept
    chosen, new = (
        assign_trellis(sought, metric, tables, rate) if rate else assign(sought, metric, tables)
    )
    form = _form(goal - new, metric)  # [O]
    better = torch.ones_like(form, dtype=torch.bool)
    if keep_better:
        old = _form(goal - value, metric)
        better = whole_segments(form - old) < 0 if rate else form < old
        form = torch.where(better, form, old)
    value.copy_(torch.where(better[:, None], new, value))
    for code, picked in zip(codes, chosen, strict=True):
        code.copy_(torch.where(better[:, None], picked, code))
    return float(form.double().sum())


def _form(error: Tensor, metric: Tensor) -> Tensor:
    return ((error @ metric) * error).sum(-1)
