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

from torch import Tensor, nn

from mgvq_quantizer.statistics import (
    Calls,
    Products,
    Run,
    checked_moment,
    next_call,
    record_calls,
    rows_of,
)

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

    def look(
        self, name: str, runs: Sequence[Run], weights: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Missing]:
        """Measure what enters a matrix of the block and what it misses; runs end at the matrix.

        Args:
            name: of the matrix.
            runs: of the block, as quantized as it is by now.
            weights: how much each row counts, one `[T]` a run; None counts all alike.

        Returns:
            The mean of `xh xh^T` `[I, I]` float64, as of `statistics.input_moment`, and the rest.

        Raises:
            CalibrationError: if nothing entered the matrix, or something not finite.
        """
        short = name.removeprefix(f"{self._prefix}.")
        moment, inputs, stream = (Products(weights) for _ in range(3))
        for run, original_run in zip(runs, self._runs, strict=True):
            x, h = _reach(short, self._block, run)
            original_x, original_h = _reach(short, self._twin, original_run)
            moment.add(x, x)
            inputs.add(original_x - x, x)
            if h is not None and original_h is not None:
                stream.add((original_h - h).float(), x)
        A, C = (checked_moment(name, total.mean()) for total in (moment, inputs))
        return A, Missing(C, stream.mean())


def _reach(short: str, block: nn.Module, run: Run) -> tuple[Tensor, Tensor | None]:
    """Return what enters a matrix `[T, I]`; the stream `[T, D]` it adds to if one of `ADDERS`."""
    attended: list[Tensor] = []
    hook = block.get_submodule("self_attn").register_forward_hook(
        lambda _module, _args, output: attended.append(output)
    )
    try:
        x = rows_of(record_calls(block.get_submodule(short), [run])[0][0])
    finally:
        hook.remove()
    if short not in ADDERS:
        return x, None
    before, stream = record_calls(block, [run])[0][:2]
    for added in (before, *attended):
        stream = stream if added is None else stream + added
    return x, stream
