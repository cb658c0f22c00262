"""Token ids to text, token by token (called by `engine.output`).

A character may be split over several tokens: its bytes are held back until it is complete, so that
text that was handed out never changes. Deltas joined are exactly what `Tokenizer.decode` returns.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgvq_runtime.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one growing sequence."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """Start with no tokens.

        Args:
            tokenizer: whose ids will come.
            skip_special_tokens: whether special tokens are left out of the text.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._dropped = tokenizer.leading_space

    def push(self, token_id: int) -> str:
        """Add one token and return the text that is now certain; "" inside a character."""
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._dropped and data:
            data, self._dropped = data.removeprefix(self._dropped), b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what was held back, as U+FFFD where it is no character, and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._dropped = self._tokenizer.leading_space
        return rest
