"""What the unquantized model says, and how far another one is from it (for `tuning`, `pipeline`).

The divergence is `KL(reference || student)` on answer tokens, in nats. Not here: what is changed to
make it smaller (`tuning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mgvq_quantizer.batches import Features, TokenBatch, embed
from mgvq_quantizer.calibration import CalibrationError, Sample
from mgvq_quantizer.statistics import Calls
from mgvq_quantizer.walk import answer_logits, walk_blocks
from mgvq_runtime.models.causal_lm import CausalLM

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reference:
    """What the unquantized model says, kept as hidden states: `V` columns would be too many."""

    hidden: Mapping[int, Tensor]
    """`[A, D]` final hidden states of a sample's answer rows, by `id` of the sample."""
    head: Tensor
    """`[V, D]`: its output head."""

    def log_probs(self, samples: Sequence[Sample]) -> Tensor:
        """Return `[A, V]` float32 of the samples' answer rows, end to end."""
        hidden = torch.cat([self.hidden[id(sample)] for sample in samples])
        return (hidden @ self.head.T).log_softmax(-1)


class Student(nn.Module):
    """The model as one call from tokens to the logits of the answer rows."""

    def __init__(self, model: CausalLM) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, features: Features) -> Tensor:
        """Return `[A, V]`."""
        hidden = self.model(embed(self.model, batch, features), batch.forward)  # [T, D]
        return self.model.logits(hidden[batch.answer_rows])


def ask_teacher(
    graph: CausalLM, batches: Sequence[TokenBatch], features: Features
) -> tuple[Reference, Tensor]:
    """Ask the unquantized model about every sample.

    Args:
        graph: dense.
        batches: samples.
        features: rows of every picture.

    Returns:
        What it says, and the moment `[D, D]` float64 (a sum) of the states that enter its head.

    Raises:
        CalibrationError: if its states are not finite.
    """
    hidden: dict[int, Tensor] = {}
    moment: Tensor | None = None
    for batch in batches:
        rows = graph(embed(graph, batch, features), batch.forward)[batch.answer_rows]  # [A, D]
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"the unquantized model's activations are not finite on {batch.samples[0].where}"
            )
        counts = [int(sample.is_answer.sum()) for sample in batch.samples]
        for sample, part in zip(batch.samples, torch.split(rows, counts), strict=True):
            hidden[id(sample)] = part
        product = (rows.T @ rows).double()
        moment = product if moment is None else moment + product
    assert moment is not None
    tied = graph.config.tie_word_embeddings
    head = graph.model.embed_tokens.weight if tied else graph.lm_head.weight
    assert isinstance(head, Tensor)
    return Reference(hidden, head.clone()), moment


def divergence(reference: Tensor, student: Tensor) -> Tensor:
    """Return `KL(reference || student)` in nats a row.

    Args:
        reference: `[A, V]` log-probabilities.
        student: `[A, V]` log-probabilities.

    Returns:
        `[A]` float32, not below -1e-6.
    """
    return (reference.exp() * (reference - student)).sum(-1)


@torch.no_grad()
def divergence_behind(
    model: CausalLM,
    start: int,
    calls: Calls,
    batches: Sequence[TokenBatch],
    reference: Reference,
) -> float:
    """Return the mean divergence over the answer tokens, from a block on.

    Args:
        model: in dense arithmetic.
        start: the block that the calls enter; their number for those that left the last one.
        calls: what enters it, one tuple a batch, whatever made it.
        batches: samples.
        reference: what the unquantized model says about the samples.
    """
    ends = walk_blocks(model.model.layers[start:], calls)
    rows = []
    for call, batch in zip(ends, batches, strict=True):
        logits = answer_logits(model, call[0], call[1], batch.answer_rows)  # [A, V]
        rows.append(divergence(reference.log_probs(batch.samples), logits.log_softmax(-1)))
    return float(torch.cat(rows).double().mean())


@torch.no_grad()
def heldout_kl(
    student: nn.Module,
    values: Values,
    batches: Sequence[TokenBatch],
    features: Features,
    reference: Reference,
) -> float:
    """Return the mean divergence over the answer tokens of some batches."""
    rows = [divergences(student, values, batch, features, reference) for batch in batches]
    return float(torch.cat(rows).double().mean())


def divergences(
    student: nn.Module, values: Values, batch: TokenBatch, features: Features, reference: Reference
) -> Tensor:
    """Return the divergence of each answer row `[A]`, the model's parameters being `values`."""
    logits = torch.func.functional_call(student, values, (batch, features))  # [A, V]
    return divergence(reference.log_probs(batch.samples), logits.log_softmax(-1))
