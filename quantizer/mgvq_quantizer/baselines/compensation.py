"""Columns one after another, each making up for the errors before it (for all but plain rounding).

The same feedback as our own `rounding`, without its codes: the last column is settled first, and a
column is asked to be `W_j + sum_i E_i L_ij` over the settled columns i, with `A = L D L^T`.
That is GPTQ, written from the last column to the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgvq_quantizer.ldl import BlockLDL, Run, factorize

DAMPING = 0.01
"""Of the mean diagonal: GPTQ's default, for every baseline."""


class Compensation:
    """A matrix that is being quantized from its last column to its first."""

    def __init__(self, weight: Tensor, factors: BlockLDL) -> None:
        """Start with nothing settled.

        Args:
            weight: `[O, I]`.
            factors: of the second moment `[I, I]` of the inputs, in the same order of columns.
        """
        self.weight = weight
        self.value = torch.zeros_like(weight)
        self._coupling = factors.lower.to(weight.dtype)
        self._error = torch.zeros_like(weight)

    def goal(self, columns: slice) -> Tensor:
        """Return what columns should be `[O, width]`, all later ones being settled."""
        later = slice(columns.stop, None)
        return self.weight[:, columns] + self._error[:, later] @ self._coupling[later, columns]

    def settle(self, columns: slice, value: Tensor) -> None:
        """Fix columns at a value `[O, width]`."""
        self.value[:, columns] = value
        self._error[:, columns] = self.weight[:, columns] - value


def factors_of(moment: Tensor, block: int) -> BlockLDL:
    """Damp and factor a second moment in blocks of columns."""
    return factorize(moment, [Run(moment.shape[0], block)], DAMPING)


def blocks_from_last(columns: slice, block: int) -> list[slice]:
    """Cut columns into blocks of one width, in the order in which they are settled."""
    starts = range(columns.start, columns.stop, block)
    return [slice(start, start + block) for start in reversed(starts)]
