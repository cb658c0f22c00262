"""What may come next, guessed from a request's own tokens (called by `engine.scheduler`).

Prompt lookup: the last few tokens are looked for further up, in prompt and answer, and what
followed them there is proposed. Answers that quote, and lists that repeat a pattern, are guessed
well; others cost a look-up. A guess is never believed: the model runs it together with the token
before, and `engine.Engine` keeps what would have been drawn anyway.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); vLLM's names.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from mgvq_runtime.config import NGramSpeculation


class NGramProposer:
    """Where each short run of one request's tokens was last followed by something."""

    def __init__(self, settings: NGramSpeculation) -> None:
        """Start without knowing a token."""
        self._settings = settings
        lengths = range(settings.prompt_lookup_max, settings.prompt_lookup_min - 1, -1)
        self._ends: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
        """By length, longest first: a run of tokens to the place after its last occurrence."""
        self._num_known = 0

    def propose(self, token_ids: Items[int], limit: int) -> tuple[int, ...]:
        """Return what may follow.

        What followed the longest run that is there a second time, its last occurrence. Where that
        is so near that it reaches into what is to be guessed, it is taken to go on repeating.

        Args:
            token_ids: All tokens of the request so far; more of them at each call.
            limit: Most tokens wanted, besides the settings' own limit.
        """
        self._learn(token_ids)
        num_tokens = min(limit, self._settings.num_speculative_tokens)
        for length, ends in self._ends.items():
            start = ends.get(tuple(token_ids[-length:]))
            if start is not None:
                period = len(token_ids) - start
                return tuple(token_ids[start + i % period] for i in range(num_tokens))
        return ()

    def _learn(self, token_ids: Items[int]) -> None:
        """Note the runs that have a successor by now."""
        for length, ends in self._ends.items():
            for end in range(max(length, self._num_known), len(token_ids)):
                ends[tuple(token_ids[end - length : end])] = end
        self._num_known = len(token_ids)
