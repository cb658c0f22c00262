"""GPTVQ: vectors along the inputs, many small codebooks, compensation vector by vector.

A codebook serves a group: some rows of a strip of at most 256 columns. It is trained on the
compensated weights when its strip is reached, in the diagonal of the inverse second moment, and
rounding measures distance in the same. At the end all codebooks are refitted to the layer's
squared error, codes fixed, and stored as int8. Published groups cost 0.125 or 0.25 bits a weight;
here their size is what the target leaves.

Source: GPTVQ (arXiv 2402.15319). Deviations: the last step is solved as the least squares it is
instead of by gradient descent; codebooks start with k-means++; weights are not normalized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mgvq_quantizer.baselines import kmeans
from mgvq_quantizer.baselines.compensation import Compensation, blocks_from_last, factors_of
from mgvq_quantizer.baselines.interface import (
    FLOAT16_BITS,
    MOST,
    Layer,
    Quantized,
    Values,
    fits,
    refuse,
)
from mgvq_quantizer.codebook import refit_codebooks
from mgvq_quantizer.ldl import BlockLDL

_STRIP = 256
_ENTRY_BITS = 8
_LARGEST_ENTRY = 127
_ITERATIONS = 25


@dataclass(frozen=True)
class Setting:
    """How a matrix is cut into groups with a codebook each."""

    dim: int
    index_bits: int
    """Of a vector; a codebook has `2**index_bits` entries."""
    strip: int
    """Columns of a group; the last strip may be narrower."""
    row_groups: int
    """Groups of a strip, with equally many rows each."""

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Count codes and codebooks, the scale of each codebook included."""
        groups = self.row_groups * -(-in_features // self.strip)
        book = _ENTRY_BITS * self.dim * 2**self.index_bits + FLOAT16_BITS
        return self.index_bits * out_features * in_features // self.dim + groups * book


def choose_setting(weight: Tensor, target: float, dim: int) -> Setting:
    """Return the fitting setting with most index bits, and of these the one with most codebooks.

    Raises:
        NotDefined: if none fits.
    """
    O, I = weight.shape  # noqa: E741
    settings = (
        Setting(dim, index_bits, strip, row_groups)
        for index_bits in range(int(MOST * target * dim), 0, -1)
        for strip in (min(_STRIP, I), I)
        for row_groups in range(O, 0, -1)
        if O % row_groups == 0
    )
    for setting in settings:
        if fits(setting.stored_bits(O, I), O * I, target):
            return setting
    raise refuse(f"GPTVQ in {dim} dimensions", weight, target)


def gptvq(layer: Layer, target: float, generator: torch.Generator, *, dim: int) -> Quantized:
    """Quantize with codebooks of `dim`-dimensional vectors.

    Args:
        layer: weight and second moment.
        target: bits a weight in full.
        generator: draws the first codebooks.
        dim: 2 or 4 as published; must divide the width.

    Raises:
        NotDefined: if no setting fits, or `dim` does not divide the width.
    """
    weight = layer.weight
    O, I = weight.shape  # noqa: E741
    if I % dim:
        raise refuse(f"GPTVQ in {dim} dimensions (no divisor of {I})", weight, target)
    setting = choose_setting(weight, target, dim)
    factors = factors_of(layer.moment, dim)
    strips = [slice(start, min(start + setting.strip, I)) for start in range(0, I, setting.strip)]
    codes, tables = _round(weight, factors, setting, strips, generator)
    tables = _refit(weight, factors.matrix.to(weight), codes, tables)
    return Quantized(
        _snap({f"codebooks.{i}": table for i, table in enumerate(tables)}),
        partial(_decode, codes),
        setting.stored_bits(O, I),
        _snap,
    )


def _round(
    weight: Tensor,
    factors: BlockLDL,
    setting: Setting,
    strips: list[slice],
    generator: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a strip's codes `[G, O/G, width/d]` and codebooks `[G, K, d]`, strip by strip."""
    d, G, O = setting.dim, setting.row_groups, weight.shape[0]  # noqa: E741
    importance = torch.linalg.cholesky(factors.blocks[0]).diagonal(dim1=1, dim2=2).square()
    importance = importance.to(weight).clamp_min(torch.finfo(torch.float32).tiny)  # [I/d, d]
    state = Compensation(weight, factors)
    codes: list[Tensor] = []
    tables: list[Tensor] = []
    for strip in reversed(strips):
        mine = importance[strip.start // d : strip.stop // d]  # [n, d]
        vectors = state.goal(strip).reshape(G, -1, d)  # [G, O/G * n, d]
        weights = mine.repeat(O // G, 1)
        book = kmeans.train(vectors, weights, 2**setting.index_bits, _ITERATIONS, generator)
        chosen = torch.empty(G, O // G, len(mine), dtype=torch.int64, device=weight.device)
        for columns in blocks_from_last(strip, d):
            i = (columns.start - strip.start) // d
            goals = state.goal(columns).view(G, -1, d)
            code = kmeans.nearest(goals, mine[i].expand(O // G, d), book)  # [G, O/G]
            chosen[:, :, i] = code
            state.settle(columns, _look_up(book, code).reshape(O, d))
        codes.insert(0, chosen)
        tables.insert(0, book)
    return codes, tables


def _refit(
    weight: Tensor, hessian: Tensor, codes: list[Tensor], tables: list[Tensor]
) -> list[Tensor]:
    """Give every group of rows the codebooks with the least squared error of the layer."""
    rows = weight.view(codes[0].shape[0], -1, weight.shape[1])  # [G, O/G, I]
    names = [[str(strip)] for strip in range(len(tables))]
    refitted = [
        refit_codebooks(
            [part],
            [hessian],
            [[[code[g]] for code in codes]],
            [names],
            {str(strip): table[g] for strip, table in enumerate(tables)},
        )
        for g, part in enumerate(rows)
    ]
    return [torch.stack([group[name] for group in refitted]) for (name,) in names]


def _decode(codes: list[Tensor], values: Values) -> Tensor:
    strips = [
        _look_up(values[f"codebooks.{i}"], code).flatten(2).flatten(0, 1)
        for i, code in enumerate(codes)
    ]
    return torch.cat(strips, dim=1)


def _look_up(tables: Tensor, codes: Tensor) -> Tensor:
    """Return `[G, ..., d]`: each group's codes `[G, ...]` in its own table of `[G, K, d]`."""
    G, K, d = tables.shape
    first = (K * torch.arange(G, device=codes.device)).view(-1, *[1] * (codes.dim() - 1))
    return tables.reshape(-1, d)[codes + first]


def _snap(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put every codebook `[G, K, d]` on int8 times its own float16 scale."""
    stored = {}
    for name, tables in values.items():
        scale = (tables.abs().amax((1, 2), keepdim=True) / _LARGEST_ENTRY).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        limits = (-_LARGEST_ENTRY, _LARGEST_ENTRY)
        stored[name] = scale * (tables / scale).round().clamp(*limits)
    return stored
