"""What enters a decoder matrix in the original model, beside what enters it now (for `stream`).

Behind quantized matrices a matrix gets other inputs than it was trained for. `shift.mismatch_shift`
makes up for what its new inputs say of the difference; here both inputs are run side by side, block
after block. Held at a time: a dense copy of the block, and what enters it for all samples.
Not here: what is made of it.

Source: method memo C.3(3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from mgvq_quantizer.statistics import Calls, Run, cross_moment, next_call


class OriginalInputs:
    """Goes through the decoder beside `stream`, on blocks that stay as they are."""

    def __init__(self, calls: Calls) -> None:
        """Stand before the first block.

        Args:
            calls: what entered it in the original model, a tuple a run of `stream`.
        """
        self._calls = calls
        self._runs: list[Run] = []
        self._twin, self._prefix = nn.Module(), ""

    def enter(self, prefix: str, block: nn.Module) -> None:
        """Copy a block before any of its matrices is quantized; forget the one before.

        Args:
            prefix: the block's name.
            block: as it is in the original model.
        """
        twin = copy.deepcopy(block)
        self._twin, self._prefix = twin, prefix
        self._runs = [partial(twin, *call) for call in self._calls]
        self._calls = [next_call(call, twin(*call)) for call in self._calls]

    def cross(
        self, name: str, module: nn.Module, runs: Sequence[Run], weights: Sequence[Tensor] | None
    ) -> Tensor:
        """Return `statistics.cross_moment` of a matrix of the block, `[I, I]`.

        Args:
            name: of the matrix.
            module: the matrix.
            runs: of the block, as quantized as it is by now.
            weights: how much each row counts, one `[T]` a run; None counts all alike.
        """
        twin = self._twin.get_submodule(name.removeprefix(f"{self._prefix}."))
        return cross_moment((module, runs), (twin, self._runs), weights)
