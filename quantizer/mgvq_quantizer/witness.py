"""What the end loss says about a block, just before it is quantized (called by `stream`).

Rounding by second moments alone takes every layer for itself. With a recipe that is gated, `stream`
asks here, block after block: gradients of the half-quantized model at the block's matrices, on
training and on held-out samples. A block's statistics are held at a time: inputs and output
gradients of its matrices.
Not here: what is made of it (`gate`).

Source: method memo C.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mgvq_quantizer.batches import Features, TokenBatch
from mgvq_quantizer.gate import MatrixEvidence
from mgvq_quantizer.gradients import MatrixGradients, sample_gradients
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


class Witness:
    """Goes through the decoder ahead of `stream`, one block at a time."""

    def __init__(self, model: CausalLM, testimony: Testimony) -> None:
        """Stand before the first block.

        Args:
            model: the one that is being quantized in place.
            testimony: samples and what the original model says about them.
        """
        self._model, self._given = model, testimony
        self._train: dict[str, MatrixGradients] = {}
        self._heldout: dict[str, MatrixGradients] = {}

    def enter(self, names: Sequence[str], generator: torch.Generator) -> None:
        """Look at a block before any of its matrices is quantized; forget the one before.

        Args:
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

    def about(self, name: str) -> MatrixEvidence:
        """Return what is known about a matrix of the block, one of `names`."""
        return MatrixEvidence(self._train[name], self._heldout[name])
