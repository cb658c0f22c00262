"""What a decoder block gets in the original model, beside what it gets now (called by `stream`).

Behind quantized matrices a matrix gets other inputs than it was trained for, and a matrix that adds
to the stream adds to another stream. `shift.mismatch_shift` makes up for what the new inputs say of
the difference; here both models are run side by side, block after block. Held at a time: a dense
copy of the block, and what enters it for all samples.
Not here: what is made of it.

Source: method memo C.3(3); for the stream there is no source that we know of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mgvq_quantizer.statistics import Calls, Run, cross_moment, next_call, record_calls

ADDERS = ("self_attn.o_proj", "mlp.down_proj")
"""Matrices of a block whose outputs are added to the stream."""


@dataclass(frozen=True, eq=False)
class Missing:
    """What a matrix misses, along the inputs `xh` that it gets: means over tokens."""

    inputs: Tensor
    """`[I, I]` float64: of `(x - xh) xh^T`, `x` the inputs of the original model."""
    stream: Tensor | None
    """`[O, I]` float64: of `(h - hh) xh^T`, `h` and `hh` the streams that its outputs are added to;
    None for a matrix that is not one of `ADDERS`."""


class OriginalBlocks:
    """Goes through the decoder beside `stream`, on blocks that stay as they are."""

    def __init__(self, calls: Calls) -> None:
        """Stand before the first block.

        Args:
            calls: what entered it in the original model, a tuple a run of `stream`.
        """
        self._calls = calls
        self._runs: list[Run] = []
        self._block, self._twin, self._prefix = nn.Module(), nn.Module(), ""

    def enter(self, prefix: str, block: nn.Module) -> None:
        """Copy a block before any of its matrices is quantized; forget the one before.

        Args:
            prefix: the block's name.
            block: as it is in the original model; it is looked at again as it changes.
        """
        twin = copy.deepcopy(block)
        self._block, self._twin, self._prefix = block, twin, prefix
        self._runs = [partial(twin, *call) for call in self._calls]
        self._calls = [next_call(call, twin(*call)) for call in self._calls]

    def missing(
        self, name: str, runs: Sequence[Run], weights: Sequence[Tensor] | None = None
    ) -> Missing:
        """Measure what a matrix of the block misses.

        Args:
            name: of the matrix.
            runs: of the block, as quantized as it is by now.
            weights: how much each row counts, one `[T]` a run; None counts all alike.
        """
        short = name.removeprefix(f"{self._prefix}.")
        module, twin = (block.get_submodule(short) for block in (self._block, self._twin))
        inputs = cross_moment((module, runs), (twin, self._runs), weights)
        stream = self._missing_stream(short, runs, weights) if short in ADDERS else None
        return Missing(inputs, stream)

    def _missing_stream(
        self, short: str, runs: Sequence[Run], weights: Sequence[Tensor] | None
    ) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        module = self._block.get_submodule(short)
        for i, (run, original_run) in enumerate(zip(runs, self._runs, strict=True)):
            x = record_calls(module, [run])[0][0].float()  # [T, I]
            now, then = _stream(short, self._block, run), _stream(short, self._twin, original_run)
            weight = torch.ones(len(x)) if weights is None else weights[i]
            missing = (then - now).float() * weight.to(x)[:, None]  # [T, D]
            total = total.to(x.device) + (missing.T @ x).double()
            count += float(weight.double().sum())
        return total / count


def _stream(short: str, block: nn.Module, run: Run) -> Tensor:
    """Return the stream `[T, D]` that one of `ADDERS` adds to."""
    if short == "mlp.down_proj":
        left: Any = run()
        stream: Tensor = left[1]
        return stream
    x, residual = record_calls(block, [run])[0][:2]
    return residual if x is None else residual + x
