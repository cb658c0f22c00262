"""The codes of one block of columns, in plain torch (called by `rounding.sweep`).

A block is one vector of a table, or two stages: vectors side by side and one across all of them.
Every entry of the one across is tried with the best of the others, couplings between these left
out; the best few are then put right with couplings. To choose vector after vector and to improve
one at a time, as was done before, leaves a quarter more error at 3 bits.
Not here: `cpu_search`, which does the same in compiled code, and blocks of a trellis
(`trellis_search`).

Source: additive codes chosen together, as AQLM (arXiv 2401.06118, section 3.1) does by beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_quantizer.codebook import nearest

FINALISTS = 4
"""Entries of the vector across whose others are chosen with couplings, too: error of six matrices
of SmolLM2 with 1, 2, 4, 8 and 16 of them .978, .974, .972, .970, .970 of a beam's of 32 states."""
_SEARCH_ELEMENTS = 1 << 22
"""Sums held at once: 16 MiB of float32."""


def assign(
    targets: Tensor, metric: Tensor, tables: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Choose the codes of one block of columns for all rows.

    Args:
        targets: `[O, b]` float32.
        metric: `[b, b]` float32, symmetric positive definite.
        tables: one `[256, d]` float32 a stage; the last one's `d` is `b`.

    Returns:
        The codes, one `[O, b/d]` int64 a stage, and the block's value `[O, b]`. A single vector is
        the nearest; of two stages better codes may exist where vectors side by side are coupled.
    """
    if len(tables) == 1:
        code = nearest(targets[None], tables[0], metric[None])[0]
        return [code[:, None]], tables[0][code]
    beside, across = tables
    stages = _Stages.of_tables(beside, across, metric)
    step = max(1, _SEARCH_ELEMENTS // stages.sums[0].numel())
    codes = torch.cat([_assign_some(rows, stages) for rows in torch.split(targets, step)])
    value = stages.beside[codes[:, :-1]].flatten(1) + stages.across[codes[:, -1]]
    return [codes[:, :-1], codes[:, -1:]], value


def without_couplings(metrics: Tensor, d: int) -> Tensor:
    """Return metrics `[..., b, b]` with nothing between vectors of length `d`."""
    vector = torch.arange(metrics.shape[-1], device=metrics.device) // d
    return metrics * (vector[:, None] == vector)


@dataclass(frozen=True, eq=False)
class _Stages:
    """Two stages of a block and what their entries cost."""

    beside: Tensor
    """`[256, d]`: the table of the vectors side by side."""
    across: Tensor
    """`[256, b]`."""
    metric: Tensor
    """`[b, b]`."""
    columns: list[slice]
    """Those of each vector side by side."""
    images: list[Tensor]
    """Of each of these: `[256, b]`, its entries times the metric."""
    norms: list[Tensor]
    """`[256]`: the entries' forms."""
    sums: list[Tensor]
    """`[entries across, entries beside]`: what one costs beside the other."""
    across_image: Tensor
    """`[256, b]`: entries times the metric without couplings."""

    @classmethod
    def of_tables(cls, beside: Tensor, across: Tensor, metric: Tensor) -> _Stages:
        d = beside.shape[1]
        columns = [slice(first, first + d) for first in range(0, across.shape[1], d)]
        images = [beside @ metric[here] for here in columns]
        own = [image[:, here] for image, here in zip(images, columns, strict=True)]
        norms = [(image * beside).sum(-1) for image in own]
        sums = [2 * across[:, here] @ i.T for i, here in zip(own, columns, strict=True)]
        across_image = across @ without_couplings(metric, d)
        return cls(beside, across, metric, columns, images, norms, sums, across_image)


def _assign_some(targets: Tensor, stages: _Stages) -> Tensor:
    """Choose the codes `[O, vectors]` of rows so few that all sums can be held."""
    beside, across, columns = stages.beside, stages.across, stages.columns
    parts = list(zip(columns, stages.images, stages.norms, strict=True))
    scores = [n - 2 * targets[:, here] @ image[:, here].T for here, image, n in parts]  # [O, 256]
    costs = (stages.across_image * across).sum(-1) - 2 * targets @ stages.across_image.T  # [O, 256]
    for score, added in zip(scores, stages.sums, strict=True):
        costs += (score[:, None] + added).amin(-1)
    final = costs.topk(FINALISTS, largest=False).indices  # [O, finalists]
    codes = [(s[:, None] + c[final]).argmin(-1) for s, c in zip(scores, stages.sums, strict=True)]
    left = targets[:, None] - across[final]  # [O, finalists, b]
    for code, here in zip(codes, columns, strict=True):
        left[..., here] -= beside[code]
    for v, (here, image, norms) in enumerate(parts):
        left[..., here] += beside[codes[v]]
        codes[v] = (norms - 2 * left @ image.T).argmin(-1)
        left[..., here] -= beside[codes[v]]
    best = ((left @ stages.metric) * left).sum(-1).argmin(-1, keepdim=True)  # [O, 1]
    return torch.stack([code.gather(1, best)[:, 0] for code in (*codes, final)], dim=1)
