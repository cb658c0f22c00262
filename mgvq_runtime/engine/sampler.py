"""Which token comes next (called by `Engine.step`).

Greedy, or temperature, top-k, top-p and min-p, in that order; what a request changes before is in
`logits_processor`. A draw uses one random number made from the request's
seed and the token's position alone, so a request's text does not depend on what else runs, nor on
a preemption. Rows whose logits hold a NaN or an infinity get no token. Nothing here knows text.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from mgvq_runtime.engine.logits_processor import process_logits
from mgvq_runtime.engine.sequence import Sequence

BAD_ROW = -1
"""Stands for the token of a row whose logits or probabilities are not finite."""


@dataclass(frozen=True)
class Sample:
    """The token drawn for one sequence."""

    token_id: int
    """BAD_ROW if the logits, or the probabilities made from them, were not finite."""
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    """Most probable tokens with their log-probabilities, best first, where asked for."""


def sample(
    logits: torch.Tensor, sequences: Items[Sequence], num_ahead: Items[int] = ()
) -> list[Sample]:
    """Draw one token a row.

    Args:
        logits: `[R, V]` float32.
        sequences: The R sequences; a token's position is the number of tokens its sequence has.
        num_ahead: How many guessed tokens stand before each of the R; empty where none do. A
            sequence that changes its logits must have none: they depend on tokens that are known.

    Returns:
        R samples, with log-probabilities where the request asked for them.
    """
    best, token_ids = logits.max(dim=-1)  # [R], [R]: NaN wins every comparison
    processed = process_logits(logits, [sequence.logits_processor for sequence in sequences])
    if processed is not logits:
        token_ids = processed.argmax(dim=-1)
    params = [sequence.request.sampling_params for sequence in sequences]
    drawn = [row for row, how in enumerate(params) if not how.is_greedy]
    if drawn:
        positions = [
            len(sequence.token_ids) + ahead
            for sequence, ahead in zip(sequences, num_ahead or [0] * len(sequences), strict=True)
        ]
        token_ids[drawn] = _draw(
            processed[drawn],
            [sequences[row] for row in drawn],
            [positions[row] for row in drawn],
        )
    samples = [
        Sample(token_id if math.isfinite(value) else BAD_ROW)
        for token_id, value in zip(token_ids.tolist(), best.tolist(), strict=True)
    ]
    for row, how in enumerate(params):
        if how.logprobs is not None and samples[row].token_id != BAD_ROW:
            samples[row] = _with_logprobs(logits[row], samples[row].token_id, how.logprobs)
    return samples


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on seed and position only."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def filtered_probs(
    logits: torch.Tensor,
    temperature: Items[float],
    top_k: Items[int],
    top_p: Items[float],
    min_p: Items[float],
) -> torch.Tensor:
    """Return the distribution a draw is made from.

    Temperature first, then the k most probable, then the smallest set of those that reaches p, then
    those at least min_p times as probable as the best.

    Args:
        logits: `[R, V]` float32, finite.
        temperature: R numbers above 0.
        top_k: R numbers; 0 or less keeps all.
        top_p: R numbers in (0, 1].
        min_p: R numbers in [0, 1].

    Returns:
        `[R, V]` float32; rows sum to 1.
    """
    R, V = logits.shape

    def column(values: Items[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]  # [R, 1]

    shifted = logits - logits.max(dim=-1, keepdim=True).values  # [R, V], at most 0
    probs = torch.softmax(shifted / column(temperature), dim=-1)
    if any(0 < k < V for k in top_k) or any(p < 1.0 for p in top_p):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # [R, V]
        limits = column([k if 0 < k < V else V for k in top_k])
        rank = torch.arange(V, device=logits.device)[None, :]  # [1, V]
        ordered = ordered.masked_fill(rank >= limits, 0.0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered  # [R, V] probability of the better ones
        is_out = (before >= column(top_p)) & (rank > 0) & (column(top_p) < 1.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill(is_out, 0.0))
    if any(m > 0.0 for m in min_p):
        floor = probs.max(dim=-1, keepdim=True).values * column(min_p)
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)


def _draw(logits: torch.Tensor, sequences: Items[Sequence], positions: Items[int]) -> torch.Tensor:
    """Draw a token for each row by inverting its distribution function; `[R]` int64.

    A row whose probabilities are not finite gets BAD_ROW: what the search finds is no token.
    """
    params = [sequence.request.sampling_params for sequence in sequences]
    probs = filtered_probs(
        torch.nan_to_num(logits, nan=0.0),
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    )
    total = probs.to(torch.float64).cumsum(dim=-1)  # [R, V]
    numbers = [uniform(seq.seed, place) for seq, place in zip(sequences, positions, strict=True)]
    targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
    whole = total[:, -1:].contiguous()  # [R, 1]
    tokens = torch.searchsorted(total, targets * whole, right=True)  # [R, 1]
    last = torch.searchsorted(total, whole)  # rounding must not pass the last possible token
    return torch.minimum(tokens, last).masked_fill(~torch.isfinite(whole), BAD_ROW)[:, 0]


def _with_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> Sample:
    """Return a sample with log-probabilities of the unfiltered distribution of `logits [V]`."""
    logprobs = torch.log_softmax(logits, dim=-1)  # [V]
    top = logprobs.topk(min(num_top, len(logprobs)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Sample(token_id, float(logprobs[token_id]), pairs)
