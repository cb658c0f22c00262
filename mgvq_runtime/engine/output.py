"""From token ids to text that can no longer change, and when to stop (used by `engine.Engine`).

Stop strings are matched on the text, across tokens: the longest end of the text that may still
become a stop string is held back. Splitting of characters over tokens is the tokenizer's business
(`tokenizer.IncrementalDetokenizer`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from mgvq_runtime.request import FinishReason, SamplingParams


class Detokenizer(Protocol):
    """What this file needs of `tokenizer.IncrementalDetokenizer`."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain."""
        ...

    def flush(self) -> str:
        """Return what was held back."""
        ...


class OutputText:
    """The answer of one request while it grows."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        params: SamplingParams,
        eos_token_ids: Collection[int],
        max_tokens: int,
    ) -> None:
        """Start an empty answer of at most `max_tokens` tokens."""
        self._detokenizer = detokenizer
        self._stop_strings = params.stop
        ends = () if params.ignore_eos else eos_token_ids
        self._stop_token_ids = frozenset((*params.stop_token_ids, *ends))
        self._eos_token_ids = frozenset(eos_token_ids)
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._held = ""

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Take the next token.

        Returns:
            The text it releases, and why the answer ends here, if it does.
        """
        self._num_tokens += 1
        is_stop = token_id in self._stop_token_ids
        if token_id not in self._eos_token_ids and (self._keeps_stop or not is_stop):
            self._held += self._detokenizer.push(token_id)
        if is_stop:
            return self._finish(FinishReason.STOP)
        if self._cut_at_stop_string():
            return self._held, FinishReason.STOP
        if self._num_tokens >= self._max_tokens:
            return self._finish(FinishReason.LENGTH)
        return self._release(), None

    def flush(self) -> str:
        """Return the text still held back, for an answer that is broken off."""
        return self._finish(FinishReason.ABORT)[0]

    def _finish(self, reason: FinishReason) -> tuple[str, FinishReason]:
        self._held += self._detokenizer.flush()
        if self._cut_at_stop_string():
            reason = FinishReason.STOP
        text, self._held = self._held, ""
        return text, reason

    def _cut_at_stop_string(self) -> bool:
        """Cut the held text at the first stop string in it; return whether there was one."""
        if self._num_tokens <= self._min_tokens:
            return False
        places = [(self._held.find(stop), len(stop)) for stop in self._stop_strings]
        found = [place for place in places if place[0] >= 0]
        if found:
            start, length = min(found)
            self._held = self._held[: start + length if self._keeps_stop else start]
        return bool(found)

    def _release(self) -> str:
        """Give out the held text up to the longest end that may become a stop string."""
        text = self._held
        keep = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:length]):
                    keep = length
                    break
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]
