"""What the end loss says about a block, just before it is quantized (called by `stream`).

Rounding by second moments alone takes every layer for itself. With a recipe that is gated, `stream`
asks here, block after block: gradients of the half-quantized model at the block's matrices, on
training and on held-out samples, and what entered each matrix in the original model. A block's
statistics are held at a time: inputs and output gradients of its matrices, and a copy of the block.
Not here: what is made of it (`gate`).

Source: method memo C.3, C.6.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mgvq_quantizer.batches import Features, TokenBatch
from mgvq_quantizer.gate import MatrixEvidence
from mgvq_quantizer.gradients import MatrixGradients, sample_gradients
from mgvq_quantizer.statistics import Calls, Run, cross_moment, next_call
from mgvq_quantizer.teacher import Reference
from mgvq_runtime.models.causal_lm import CausalLM

DRAWS = 4
"""Labels drawn for each held-out sample: a tenth of the samples is held out, so that their
curvature needs them most."""


@dataclass(frozen=True, eq=False)
class Testimony:
    """What may be asked about."""

    train: Sequence[TokenBatch]
    heldout: Sequence[TokenBatch]
    """Both small enough for a backward pass."""
    features: Features
    """Rows of every picture, from the quantized vision tower."""
    reference: Reference
    original_calls: Calls | None
    """What entered the first block of the original model, a tuple a run of `stream`; None where the
    mismatch of inputs is not asked for."""


class Witness:
    """Goes through the decoder ahead of `stream`, one block at a time."""

    def __init__(self, model: CausalLM, testimony: Testimony) -> None:
        """Stand before the first block.

        Args:
            model: the one that is being quantized in place.
            testimony: samples and what the original model says about them.
        """
        self._model, self._given = model, testimony
        self._calls = testimony.original_calls
        self._train: dict[str, MatrixGradients] = {}
        self._heldout: dict[str, MatrixGradients] = {}
        self._twin: nn.Module | None = None
        self._prefix = ""
        self._runs: list[Run] = []

    def enter(
        self, prefix: str, block: nn.Module, names: Sequence[str], generator: torch.Generator
    ) -> None:
        """Look at a block before any of its matrices is quantized; forget the one before.

        Args:
            prefix: the block's name.
            block: as it is in the original model.
            names: its matrices that will be asked about; without any, no gradient is computed.
            generator: draws labels.
        """
        given = self._given
        self._train, self._heldout = {}, {}
        if names:
            ask = partial(sample_gradients, self._model, names)
            rest = (given.features, given.reference, generator)
            self._train = ask(given.train, *rest)
            self._heldout = ask(given.heldout, *rest, draws=DRAWS)
        if self._calls is not None:
            twin = copy.deepcopy(block)
            self._twin, self._prefix = twin, prefix
            self._runs = [partial(twin, *call) for call in self._calls]
            self._calls = [next_call(call, twin(*call)) for call in self._calls]

    def about(
        self, name: str, module: nn.Module, runs: Sequence[Run], weights: Sequence[Tensor] | None
    ) -> MatrixEvidence:
        """Return what is known about a matrix of the block.

        Args:
            name: one of `names`.
            module: the matrix.
            runs: of the block, as quantized as it is by now.
            weights: how much each row counts, one `[T]` a run; None counts all alike.
        """
        cross = None
        if self._twin is not None:
            twin = self._twin.get_submodule(name.removeprefix(f"{self._prefix}."))
            cross = cross_moment((module, runs), (twin, self._runs), weights)
        return MatrixEvidence(self._train[name], self._heldout[name], cross)
