"""What each run of input channels of each matrix loses at each rate, in nats (for `survey`).

Some rows of every matrix of the unquantized decoder are rounded on trial at every rate. The loss of
their channels is read from the residuals `eta` of the block factorisation, whose forms `tr(eta_k
D_k eta_k^T)` sum to the loss of the layer: what is left of a channel's error after all others have
compensated it. That is done in two curvatures which are then combined: *local*, every output's
relative error counting alike, and *global*, tokens and outputs weighted by their squared gradients.
The scale is measured: the divergence of the model when this matrix alone has the reference rate, or
one below it, where a divergence no longer grows as a form does. Not here: who gets which rate
(`precision`).

Source: method memo B.3 to B.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_quantizer.gradients import Gradients
from mgvq_quantizer.ldl import BlockLDL, Run, factorize, without_dead_inputs
from mgvq_quantizer.ordering import ascending, quick, some_rows
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.solver import SMALLEST_SCALE, Problem, solve

_BLOCK = 8
"""Columns whose residual is measured together: the longest vector of any rate."""
_SMALLEST_LOSS = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """What one matrix loses, by run of channels and by rate."""

    name: str
    rates: tuple[int, ...]
    widths: tuple[int, ...]
    """Channels of each run, in ascending order of their second moment."""
    losses: tuple[tuple[float, ...], ...]
    """[run][rate]: nats an answer token."""
    alone: float
    """Nats an answer token when this matrix alone has the reference rate."""
    picture_share: tuple[float, ...]
    """Of each run: the share of its inputs' energy that picture tokens bring."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Second moments `[I, I]` float64 of what enters one matrix."""

    plain: Tensor
    """Every token counts alike: the local curvature."""
    weighted: Tensor
    """Tokens count by their gradients: the global curvature."""
    pictures: Tensor
    """`[I]`: the part of `weighted`'s diagonal that picture tokens bring."""


def measure(
    name: str,
    weight: Tensor,
    inputs: Inputs,
    gradients: Gradients,
    recipe: QuantRecipe,
    alone: Callable[[Tensor], float],
    generator: torch.Generator,
) -> Sensitivity:
    """Round one matrix at every rate and say what its channels lose.

    Args:
        name: of the matrix.
        weight: `[O, I]` float32.
        inputs: moments of its inputs.
        gradients: at its outputs.
        recipe: rates, damping, how the curvatures are combined.
        alone: returns the model's divergence when this matrix has the given values; asked at the
            reference rate and below.
        generator: seeds the trial tables.
    """
    weight, I = without_dead_inputs(weight, inputs.plain), weight.shape[1]  # noqa: E741
    order, rates = ascending(inputs.weighted), recipe.rates
    state = generator.get_state()

    def rounded(rows: Tensor, rate: int) -> Tensor:
        layout = VQLayout.uniform(len(rows), I, rate, True, recipe.codec, recipe.window)
        problem = Problem(rows, inputs.weighted, order, layout)
        solution = solve([problem], quick(recipe), generator.set_state(state), is_trial=True)[0]
        return ops.vq_dequantize(solution.weight)

    some = some_rows(weight)
    curvatures = _curvatures(some, inputs, gradients, order, recipe.damping)
    alone_at: list[float] = []  # [rate], up to the reference
    tables: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rate in rates:
        if rate <= recipe.reference_rate:
            whole = rounded(weight, rate)
            alone_at.append(max(alone(whole), _SMALLEST_LOSS))
            values = some_rows(whole)
        else:
            values = rounded(some, rate)
        error = (some - values)[:, order].double()  # [rows, I]
        for table, curvature in zip(tables, curvatures, strict=True):
            table.append(curvature.losses(error))
    local, shared = (torch.stack(table) for table in tables)  # [R, I/8]
    combined = _combined(local, shared, recipe.global_share, len(alone_at) - 1)
    widths = run_widths(I)
    losses = _by_run(_in_nats(combined, alone_at), widths)  # [R, K]
    energy, pictures = (
        _by_run(x[order][None], widths)[0] for x in (inputs.weighted.diagonal(), inputs.pictures)
    )
    return Sensitivity(
        name,
        rates,
        widths,
        tuple(tuple(run) for run in losses.T.tolist()),
        alone_at[-1],
        tuple((pictures / energy.clamp_min(1e-30)).tolist()),
    )


def run_widths(in_features: int) -> tuple[int, ...]:
    """Cut channels into runs as narrow as the format's bands may be, or into one if none fits."""
    width = 32 if in_features <= 1024 else 128
    return (width,) * (in_features // width) if in_features % width == 0 else (in_features,)


@dataclass(frozen=True, eq=False)
class _Curvature:
    """How much the errors of some rows of a matrix count, its channels in order."""

    rows: Tensor
    """`[rows]` float64."""
    inputs: BlockLDL
    """Of the second moment, in blocks of 8 channels."""

    def losses(self, error: Tensor) -> Tensor:
        """Return `[I/8]`: each block's part of `sum_i rows_i e_i A e_i^T`, from the residuals.

        Args:
            error: `[rows, I]` float64.
        """
        (blocks,) = self.inputs.blocks
        eta = (error @ self.inputs.lower).view(len(error), -1, _BLOCK)  # [rows, I/8, 8]
        image = torch.einsum("okb,kbc->okc", eta, blocks)
        return torch.einsum("okb,okb,o->k", eta, image, self.rows)


def _curvatures(
    some: Tensor, inputs: Inputs, gradients: Gradients, order: Tensor, damping: float
) -> tuple[_Curvature, _Curvature]:
    """Return the local and the global curvature, for some rows of the weight."""
    energies = some.square().mean(1).clamp_min(SMALLEST_SCALE**2).double()  # [rows]
    whole = [Run(len(order), _BLOCK)]
    local, shared = (
        factorize(moment[order][:, order], whole, damping)
        for moment in (inputs.plain, inputs.weighted)
    )
    return (
        _Curvature(1 / energies, local),
        _Curvature(some_rows(gradients.rows).to(energies), shared),
    )


def _combined(local: Tensor, shared: Tensor, global_share: float, reference: int) -> Tensor:
    """Geometric mean of both curvatures `[R, I/8]`, each as a share of its loss at one rate."""
    tables = [table.clamp_min(1e-300) for table in (local, shared)]
    low, high = (table / table[reference].sum() for table in tables)
    return high**global_share * low ** (1 - global_share)


def _in_nats(combined: Tensor, alone_at: Sequence[float]) -> Tensor:
    """Scale `[R, I/8]` to what was measured at the first rates, the rest like the last of them."""
    scales = torch.tensor(alone_at).to(combined) / combined[: len(alone_at)].sum(1)
    return combined * torch.cat([scales, scales[-1:].expand(len(combined) - len(scales))])[:, None]


def _by_run(values: Tensor, widths: Sequence[int]) -> Tensor:
    """Sum `[R, I]` or `[R, I/8]` over runs of channels: `[R, K]`."""
    block = sum(widths) // values.shape[1]
    parts = torch.split(values, [width // block for width in widths], dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)
