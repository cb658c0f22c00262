"""What a request changes in its own logits before a token is chosen (called by `sampler.sample`).

Logit bias, penalties, `min_tokens` and the grammar of structured outputs, in that order, which
gives what transformers and vLLM give; temperature and filters come after, in `sampler`. Most
requests change nothing and have no `LogitsProcessor`. Its state depends on the tokens so far and on
nothing else, so it outlives batching and preemption.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Items

import numpy as np
import torch

from mgvq_runtime.engine.grammar import Grammar, GrammarCompiler
from mgvq_runtime.errors import RequestError
from mgvq_runtime.request import Request, SamplingParams


class LogitsProcessor:
    """The changes one request asks for, and what they depend on."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Items[int],
        end_token_ids: Collection[int],
        grammar: Grammar | None = None,
    ) -> None:
        """Start before the first token of the answer.

        Args:
            params: What was asked.
            prompt_token_ids: What the repetition penalty looks at besides the answer.
            end_token_ids: Tokens that `min_tokens` holds back.
            grammar: The form of the answer, at its beginning.
        """
        self.params = params
        self.grammar = grammar
        seen = prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self.counts: dict[int, int] = dict.fromkeys(seen, 0)
        """How often the answer has a token; 0 for a token of the prompt alone."""
        self._end_token_ids = end_token_ids
        self._num_tokens = 0

    @property
    def held_back(self) -> Collection[int]:
        """End tokens that may not come yet."""
        return self._end_token_ids if self._num_tokens < self.params.min_tokens else ()

    def push(self, token_id: int) -> bool:
        """Take the token that was chosen; return False if the grammar cannot be followed on."""
        self._num_tokens += 1
        if self.params.has_penalty:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
        return self.grammar is None or self.grammar.push(token_id)


def make_logits_processor(request: Request, grammars: GrammarCompiler) -> LogitsProcessor | None:
    """Return a request's processor; None where it changes nothing.

    Raises:
        RequestError: if the form of the answer is wrong, or a token to be biased is not in the
            vocabulary.
    """
    params = request.sampling_params
    vocab_size = grammars.vocab_size
    if unknown := [token_id for token_id in params.logit_bias if token_id >= vocab_size]:
        raise RequestError(
            f"logit_bias names token {unknown[0]}; the vocabulary has {vocab_size} tokens",
            param="logit_bias",
        )
    form = params.structured_outputs
    grammar = None if form is None else grammars.compile(form)
    if not (params.logit_bias or params.has_penalty or params.min_tokens or grammar):
        return None
    ends = {
        *params.stop_token_ids,
        *(() if params.ignore_eos else grammars.tokenizer.eos_token_ids),
    }
    known_ends = sorted(token_id for token_id in ends if token_id < vocab_size)
    return LogitsProcessor(params, request.prompt.token_ids, known_ends, grammar)


def process_logits(logits: torch.Tensor, processors: Items[LogitsProcessor | None]) -> torch.Tensor:
    """Apply each request's changes to its own row.

    Args:
        logits: `[R, V]` float32; left as it is.
        processors: R processors, None for a row that stays.

    Returns:
        `[R, V]` float32; `logits` itself where no row changes.
    """
    asked = [(row, one) for row, one in enumerate(processors) if one is not None]
    if not asked:
        return logits
    logits = logits.clone()
    _add_biases(logits, asked)
    _penalize(logits, [(row, one) for row, one in asked if one.params.has_penalty])
    _hold_back(logits, [(row, one) for row, one in asked if one.grammar is None])
    _follow_grammars(logits, asked)
    return logits


def _add_biases(logits: torch.Tensor, asked: Items[tuple[int, LogitsProcessor]]) -> None:
    entries = [(row, *pair) for row, one in asked for pair in one.params.logit_bias.items()]
    if entries:
        rows, tokens, values = zip(*entries, strict=True)
        places = torch.tensor([rows, tokens], device=logits.device)  # [2, N]
        added = torch.tensor(values, dtype=logits.dtype, device=logits.device)  # [N]
        logits[places[0], places[1]] += added


def _penalize(logits: torch.Tensor, asked: Items[tuple[int, LogitsProcessor]]) -> None:
    """Weaken tokens that were there before.

    Repetition: the logit of a token of prompt or answer is divided by the penalty, or multiplied
    where it is negative. Then frequency, times its count in the answer, and presence are taken off.

    Source: Keskar et al., CTRL, section 4.1 (arXiv 1909.05858); OpenAI, "Frequency and presence
    penalties".
    """
    if not asked:
        return
    rows = np.repeat([row for row, _ in asked], [len(one.counts) for _, one in asked])
    tokens = np.array([token for _, one in asked for token in one.counts], dtype=np.int64)
    counts = np.array([count for _, one in asked for count in one.counts.values()], dtype=np.int64)
    places = torch.from_numpy(np.stack([rows, tokens])).to(logits.device)  # [2, N]

    def each(values: Items[float]) -> np.ndarray:
        return np.repeat(values, [len(one.counts) for _, one in asked])

    factors = each([one.params.repetition_penalty for _, one in asked])
    taken = each([one.params.frequency_penalty for _, one in asked]) * counts
    taken += each([one.params.presence_penalty for _, one in asked]) * (counts > 0)
    numbers = torch.from_numpy(np.stack([factors, taken]).astype(np.float32)).to(logits.device)
    old = logits[places[0], places[1]]  # [N]
    weakened = torch.where(old > 0, old / numbers[0], old * numbers[0])
    logits[places[0], places[1]] = weakened - numbers[1]


def _hold_back(logits: torch.Tensor, asked: Items[tuple[int, LogitsProcessor]]) -> None:
    """Forbid the end tokens of answers that are too short."""
    entries = [(row, token) for row, one in asked for token in one.held_back]
    if entries:
        places = torch.tensor(entries, device=logits.device)  # [N, 2]
        logits[places[:, 0], places[:, 1]] = -math.inf


def _follow_grammars(logits: torch.Tensor, asked: Items[tuple[int, LogitsProcessor]]) -> None:
    """Forbid every token that leaves the form of its answer."""
    rows = [row for row, one in asked if one.grammar is not None]
    if not rows:
        return
    words = [one.grammar.allowed(one.held_back) for _, one in asked if one.grammar is not None]
    packed = torch.from_numpy(np.stack(words)).to(logits.device)  # [G, V/32] int32
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).flatten(1)  # [G, at least V]
    logits[rows] = logits[rows].masked_fill(allowed[:, : logits.shape[1]] == 0, -math.inf)
