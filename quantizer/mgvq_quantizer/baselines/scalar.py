"""Plain rounding and GPTQ: evenly spaced levels, a scale and an offset a group of inputs.

Groups are 128 consecutive inputs of a row; where the width is no multiple of 128 the last group is
what is left, as in GPTQ's code. One group a row, with or without an offset of its own, are the
cheaper settings. GPTQ goes through the columns by falling second moment ("act-order") with groups
fixed beforehand ("static groups"), so that no order has to be stored.

Source: GPTQ (arXiv 2210.17323) and its public code for act-order, static groups and clip search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_quantizer.baselines.compensation import Compensation, blocks_from_last, factors_of
from mgvq_quantizer.baselines.interface import (
    FLOAT16_BITS,
    Layer,
    Quantized,
    Values,
    fits,
    refuse,
)

GROUP = 128
_MAX_BITS = 8
_SHRINKS = tuple(1 - i / 50 for i in range(36))
"""Shares of a group's range that the clip search tries: 1 down to 0.3."""


@dataclass(frozen=True)
class Setting:
    """How a matrix is cut into groups, and the levels of each."""

    bits: int
    group: int
    """Inputs a group."""
    has_offset: bool
    """Whether a group stores its lowest level; without, levels lie evenly around zero."""

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Count codes, scales and offsets of a matrix."""
        groups = out_features * -(-in_features // self.group)
        numbers = 2 if self.has_offset else 1
        return self.bits * out_features * in_features + groups * numbers * FLOAT16_BITS


def choose_setting(weight: Tensor, target: float) -> Setting:
    """Return the setting that spends most among those that fit.

    Raises:
        NotDefined: if none fits.
    """
    O, I = weight.shape  # noqa: E741
    settings = [
        Setting(bits, *form)
        for bits in range(_MAX_BITS, 0, -1)
        for form in ((GROUP, True), (I, True), (I, False))
    ]
    fitting = [s for s in settings if fits(s.stored_bits(O, I), O * I, target)]
    if not fitting:
        raise refuse("rounding to even levels", weight, target)
    return max(fitting, key=lambda setting: setting.stored_bits(O, I))


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of every weight: `offset + scale * {0 .. 2^bits - 1}`."""

    setting: Setting
    scale: Tensor
    """`[O, groups]`: a float16 each."""
    offset: Tensor | None
    """`[O, groups]`: a float16 each; None puts the levels evenly around zero."""
    group_of: Tensor
    """`[I]` int64: the group of each input."""

    @property
    def values(self) -> Values:
        """What is stored beside the codes."""
        offset = {} if self.offset is None else {"offset": self.offset}
        return {"scale": self.scale, **offset}

    def decode(self, codes: Tensor, values: Values, columns: slice = slice(None)) -> Tensor:
        """Return the weights `[O, width]` of codes of the same shape."""
        groups = self.group_of[columns]
        scale, offset = values["scale"], values.get("offset")
        if offset is None:
            offset = _even_offset(scale, self.setting.bits)
        return scale[:, groups] * codes + offset[:, groups]

    def encode(self, weight: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return the nearest level's number for weights `[O, width]`, as float."""
        groups = self.group_of[columns]
        offset = self.offset
        if offset is None:
            offset = _even_offset(self.scale, self.setting.bits)
        steps = (weight - offset[:, groups]) / self.scale[:, groups]
        return steps.round().clamp(0, 2**self.setting.bits - 1)


def fit_grid(weight: Tensor, setting: Setting) -> Grid:
    """Choose every group's range by trying shrunken ones for the least squared error.

    Args:
        weight: `[O, I]` float32.
        setting: bits and groups.

    Returns:
        The grid, its numbers rounded to float16.
    """
    I = weight.shape[1]  # noqa: E741
    group_of = torch.arange(I, device=weight.device) // setting.group
    parts = [_fit_group(part, setting) for part in torch.split(weight, setting.group, dim=1)]
    scale = torch.stack([scale for scale, _ in parts], dim=1)
    offset = torch.stack([offset for _, offset in parts], dim=1)
    return Grid(setting, scale, offset if setting.has_offset else None, group_of)


def rtn(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
    """Round to nearest, with clip search.

    Args:
        layer: its second moment is not looked at.
        target: bits a weight in full.
        generator: not used: the method is deterministic.

    Raises:
        NotDefined: if no setting fits.
    """
    grid = fit_grid(layer.weight, choose_setting(layer.weight, target))
    return _quantized(layer.weight, grid, grid.encode(layer.weight))


def gptq(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
    """Round column by column, largest second moment first, compensating in the others.

    Args:
        layer: weight and second moment.
        target: bits a weight in full.
        generator: not used: the method is deterministic.

    Raises:
        NotDefined: if no setting fits.
    """
    grid = fit_grid(layer.weight, choose_setting(layer.weight, target))
    return _quantized(layer.weight, grid, gptq_codes(layer.weight, layer.moment, grid))


def gptq_codes(weight: Tensor, moment: Tensor, grid: Grid) -> Tensor:
    """Return GPTQ's codes `[O, I]` on a given grid, as float."""
    order = moment.diagonal().argsort(stable=True)  # settled from the last to the first
    ordered = Grid(grid.setting, grid.scale, grid.offset, grid.group_of[order])
    state = Compensation(weight[:, order], factors_of(moment[order][:, order], 1))
    codes = torch.empty_like(weight)
    for column in blocks_from_last(slice(0, len(order)), 1):
        code = ordered.encode(state.goal(column), column)
        state.settle(column, ordered.decode(code, ordered.values, column))
        codes[:, order[column]] = code
    return codes


def _quantized(weight: Tensor, grid: Grid, codes: Tensor) -> Quantized:
    return Quantized(
        grid.values,
        lambda values: grid.decode(codes, values),
        grid.setting.stored_bits(weight.shape[0], weight.shape[1]),
    )


def _even_offset(scale: Tensor, bits: int) -> Tensor:
    return scale * (-(2**bits - 1) / 2)


def _fit_group(weight: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return scale and lowest level `[O]` of one group of columns `[O, g]`."""
    levels = 2**setting.bits - 1
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    if not setting.has_offset:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(low, float("inf"))
    kept_scale, kept_offset = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        scale = (shrink * (high - low) / levels).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        offset = (shrink * low).half().float()
        if not setting.has_offset:
            offset = _even_offset(scale, setting.bits)
        steps = ((weight - offset[:, None]) / scale[:, None]).round().clamp(0, levels)
        error = (scale[:, None] * steps + offset[:, None] - weight).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        kept_scale = torch.where(better, scale, kept_scale)
        kept_offset = torch.where(better, offset, kept_offset)
    return kept_scale, kept_offset
