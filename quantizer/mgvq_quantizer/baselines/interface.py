"""What a baseline is: a matrix and a number of bits in, a decoded matrix and its true cost out.

Read by every file beside it. Bits are counted in full: codes, group scales and offsets, codebooks,
signs, group membership. A method picks among its own settings by `fits` or `afforded`; where none
of them costs what was asked for, it raises `NotDefined`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_runtime.errors import MgvqError

MOST = 1.05
"""Share of the target a setting may cost, in favour of the baselines: with it, 2 bits and one scale
a row stand for "2.0 bits". Tables and plots state what was really spent."""
LEAST = 0.90
"""Share of the target a setting must spend to stand for it."""

FLOAT16_BITS = 16

Values = Mapping[str, Tensor]


class NotDefined(MgvqError, ValueError):
    """A method has no setting that costs about as many bits as were asked for."""


@dataclass(frozen=True, eq=False)
class Fisher:
    """First and second moments of the loss gradient over samples, for methods that look at it."""

    gradient: Tensor
    """`[O, I]` float64: the mean over samples of the gradient `G_s`."""
    outputs: Tensor
    """`[O, O]` float64: the mean of `G_s G_s^T / I`."""
    inputs: Tensor
    """`[I, I]` float64: the mean of `G_s^T G_s / O`."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer as a baseline sees it."""

    weight: Tensor
    """`[O, I]` float32."""
    moment: Tensor
    """`[I, I]` float64: the mean of `x x^T` over calibration tokens."""
    fisher: Fisher | None = None
    """Only for methods that ask for it."""


def to_float16(values: Values) -> dict[str, Tensor]:
    """Round values to the float16 they are stored in; returned as float32."""
    return {name: value.half().float() for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized matrix: what is stored, and what it costs."""

    values: Values
    """The stored real numbers by name (scales, codebooks, ...), float32 after `store`."""
    decode: Callable[[Values], Tensor]
    """Makes the matrix `[O, I]` of such values, the codes being fixed; differentiable."""
    bits: int
    """Everything that is stored."""
    store: Callable[[Values], dict[str, Tensor]] = to_float16
    """Rounds values to what the stored types can hold."""

    @property
    def weight(self) -> Tensor:
        """`[O, I]` float32: the decoded matrix."""
        return self.decode(self.values)


Baseline = Callable[[Layer, float, torch.Generator], Quantized]
"""(layer, bits a weight to spend in full, seed) -> the quantized matrix, or `NotDefined`."""


def fits(bits: float, num_weights: int, target: float) -> bool:
    """Return whether so many bits in all stand for `target` bits a weight."""
    return LEAST * target <= bits / num_weights <= MOST * target


def refuse(what: str, weight: Tensor, target: float) -> NotDefined:
    """Return the error to raise where no setting fits."""
    O, I = weight.shape  # noqa: E741
    return NotDefined(
        f"{what} has no setting between {LEAST * target:.2f} and {MOST * target:.2f} bits a weight "
        f"in full for a {O}x{I} matrix"
    )
