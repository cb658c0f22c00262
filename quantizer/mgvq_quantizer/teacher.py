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
from mgvq_quantizer.walk import answer_states, walk_blocks
from mgvq_runtime.models.causal_lm import CausalLM

Values = dict[str, Tensor]
LOGIT_ROWS = 256
"""Rows of `V` logits held at once; those of 8192 rows of text would take gigabytes."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the unquantized model says, kept as hidden states: `V` columns would be too many."""

    hidden: Mapping[int, Tensor]
    """`[A, D]` final hidden states of a sample's answer rows, by `id` of the sample."""
    head: Tensor
    """`[V, D]`: its output head."""

    def log_probs(self, samples: Sequence[Sample]) -> Tensor:
        """Return `[A, V]` float32 of the samples' answer rows, end to end."""
        return self.log_probs_of(self.states(samples))

    def states(self, samples: Sequence[Sample]) -> Tensor:
        """Return the final hidden states `[A, D]` of the samples' answer rows, end to end."""
        return torch.cat([self.hidden[id(sample)] for sample in samples])

    def log_probs_of(self, hidden: Tensor) -> Tensor:
        """Return `[A, V]` float32 of hidden states `[A, D]`."""
        return (hidden @ self.head.T).log_softmax(-1)


class Student(nn.Module):
    """The model as one call from tokens to its divergence from the reference."""

    def __init__(self, model: CausalLM) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, features: Features, reference: Reference) -> Tensor:
        """Return the divergence of each answer row `[A]`."""
        hidden = self.model(embed(self.model, batch, features), batch.forward)  # [T, D]
        return state_divergences(self.model, hidden[batch.answer_rows], batch.samples, reference)


def ask_teacher(
    graph: CausalLM,
    batches: Sequence[TokenBatch],
    features: Features,
    heard: Reference | None = None,
) -> Reference:
    """Ask the unquantized model about every sample.

    Args:
        graph: dense.
        batches: samples.
        features: rows of every picture.
        heard: what it said about others, to be in the answer too.

    Raises:
        CalibrationError: if its states are not finite.
    """
    hidden: dict[int, Tensor] = {}
    for batch in batches:
        rows = graph(embed(graph, batch, features), batch.forward)[batch.answer_rows]  # [A, D]
        if not bool(torch.isfinite(rows).all()):
            raise _blame(batch, rows, features)
        counts = [int(sample.is_answer.sum()) for sample in batch.samples]
        for sample, part in zip(batch.samples, torch.split(rows, counts), strict=True):
            hidden[id(sample)] = part
    if heard is not None:
        return Reference({**heard.hidden, **hidden}, heard.head)
    tied = graph.config.tie_word_embeddings
    head = graph.model.embed_tokens.weight if tied else graph.lm_head.weight
    assert isinstance(head, Tensor)
    return Reference(hidden, head.clone())


def not_finite(sample: Sample, features: Features) -> CalibrationError:
    """Return an error that names a sample, or one of its pictures, that the model cannot take."""
    seen = [bool(torch.isfinite(features[id(image)]).all()) for image in sample.images]
    what = "activations" if all(seen) else f"vision tower's rows of picture {seen.index(False) + 1}"
    return CalibrationError(
        f"the unquantized model's {what} are not finite on {sample.where}: check the source with "
        "mgvq-chat, or leave this conversation out"
    )


def _blame(batch: TokenBatch, rows: Tensor, features: Features) -> CalibrationError:
    """Find the sample of a batch that drives the model beyond float32."""
    counts = [int(sample.is_answer.sum()) for sample in batch.samples]
    parts = zip(batch.samples, torch.split(rows, counts), strict=True)
    sample = next(sample for sample, part in parts if not bool(torch.isfinite(part).all()))
    return not_finite(sample, features)


def divergence(reference: Tensor, student: Tensor) -> Tensor:
    """Return `KL(reference || student)` in nats a row.

    Args:
        reference: `[A, V]` log-probabilities.
        student: `[A, V]` log-probabilities.

    Returns:
        `[A]` float32, not below -1e-6.
    """
    return (reference.exp() * (reference - student)).sum(-1)


def state_divergences(
    model: CausalLM, hidden: Tensor, samples: Sequence[Sample], reference: Reference
) -> Tensor:
    """Return the divergence of each answer row `[A]`, given a model's final states.

    Args:
        model: its head is asked.
        hidden: `[A, D]` states of the samples' answer rows, end to end.
        samples: what they are of.
        reference: what the unquantized model says about the samples.
    """
    parts = (torch.split(rows, LOGIT_ROWS) for rows in (hidden, reference.states(samples)))
    found = [
        divergence(reference.log_probs_of(theirs), model.logits(ours).log_softmax(-1))
        for ours, theirs in zip(*parts, strict=True)
    ]
    return torch.cat(found)


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
        hidden = answer_states(model, call[0], call[1], batch.answer_rows)
        rows.append(state_divergences(model, hidden, batch.samples, reference))
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
    found: Tensor = torch.func.functional_call(student, values, (batch, features, reference))
    return found
