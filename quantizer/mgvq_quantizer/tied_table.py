"""What errors of a token table cost that is the output head as well (called by `stream`).

A row is read once as the model's input, where every channel's error counts alike, and once against
the last hidden states, where errors count along the directions these take. How much each use counts
is measured, by noise in one of them at a time. Not here: the rounding (`solver`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgvq_quantizer.batches import Features, TokenBatch, embed
from mgvq_quantizer.teacher import LOGIT_ROWS, Reference, divergence
from mgvq_runtime.layers.row_parts import SplitEmbedding
from mgvq_runtime.models.causal_lm import CausalLM

_NOISE = 0.07
"""Of a row's root mean square: what 4 bits leave. Losses grow by its square."""
_SMALLEST = 1e-12
"""What a use or a state still counts that does not matter at all."""


@torch.no_grad()
def tied_moment(
    model: CausalLM,
    reference: Reference,
    batches: Sequence[TokenBatch],
    features: Features,
    generator: torch.Generator,
) -> Tensor:
    """Return the second moment by which the errors of the table's rows count.

    Args:
        model: in dense arithmetic; as it was when this returns.
        reference: what it says about all samples.
        batches: samples on which the uses are weighed.
        features: rows of their pictures.
        generator: of the noise.

    Returns:
        `[D, D]` float64, its mean diagonal 1.
    """
    parts = _table_weights(model)
    plain = torch.cat(parts)  # [V, D], a copy
    size = _NOISE * plain.square().mean(1, keepdim=True).sqrt()  # [V, 1]
    noise = torch.randn(plain.shape, generator=generator).to(plain)
    noisy = plain + size * noise  # [V, D]
    states = _states(model, batches, features)
    _fill(parts, noisy)
    try:
        moved = _states(model, batches, features)
    finally:
        _fill(parts, plain)
    as_input, as_head = _divergences(states, moved, plain, noisy)
    share = as_input / (as_input + as_head)
    read = head_moment(reference)
    same = torch.eye(len(read), dtype=torch.float64, device=read.device)
    return share * same + (1.0 - share) * read / read.diagonal().mean()


def _table_weights(model: CausalLM) -> list[Tensor]:
    """Return the rows of a dense token table, part by part; a whole one is one part."""
    table = model.model.embed_tokens
    parts = table.parts if isinstance(table, SplitEmbedding) else [table]
    weights = [part.weight for part in parts]
    return [weight for weight in weights if isinstance(weight, Tensor)]


def _fill(parts: Sequence[Tensor], values: Tensor) -> None:
    for part, rows in zip(parts, torch.split(values, [len(p) for p in parts]), strict=True):
        part.copy_(rows)


def head_moment(reference: Reference) -> Tensor:
    """Return the moment `[D, D]` float64 of what enters the head, surer states counting less.

    Independent errors `e_v` of the head's rows make a divergence of `1/2 sum_v p_v (1 - p_v)
    (e_v h)^2` in second order; all rows share one moment, so that a state's weight is the sum.
    """
    width = reference.head.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=reference.head.device)
    for states in torch.split(torch.cat(list(reference.hidden.values())), LOGIT_ROWS):
        sure = reference.log_probs_of(states).exp().square().sum(-1)  # [a]
        doubt = (1.0 - sure).clamp_min(_SMALLEST)
        moment += ((states * doubt[:, None]).T @ states).double()
    return moment


def _states(model: CausalLM, batches: Sequence[TokenBatch], features: Features) -> Tensor:
    """Return the final hidden states `[A, D]` of all answer rows."""
    rows = (model(embed(model, b, features), b.forward)[b.answer_rows] for b in batches)
    return torch.cat(list(rows))


def _divergences(
    states: Tensor, moved: Tensor, plain: Tensor, noisy: Tensor
) -> tuple[float, float]:
    """Return the summed KL of noise in the input alone and in the head alone."""
    as_input = as_head = _SMALLEST
    for mine, other in zip(*(torch.split(x, LOGIT_ROWS) for x in (states, moved)), strict=True):
        said = (mine @ plain.T).log_softmax(-1)  # [a, V]
        as_input += float(divergence(said, (other @ plain.T).log_softmax(-1)).double().sum())
        as_head += float(divergence(said, (mine @ noisy.T).log_softmax(-1)).double().sum())
    return as_input, as_head
