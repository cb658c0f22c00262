"""Where added tokens stand in a text (called by `tokenizer.Tokenizer`).

Finds literals as transformers does: leftmost first, then longest. Who wrote them is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from mgvq_runtime.tokenizer.folder import AddedToken


class Literals:
    """The literals of some added tokens."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        """Take tokens by how they are spelled in the texts that will be looked at."""
        self._tokens = tokens
        spelled = [
            rf"(?<!\w){re.escape(text)}(?!\w)" if tokens[text].single_word else re.escape(text)
            for text in sorted(tokens, key=lambda text: (-len(text), tokens[text].id))
        ]
        self._pattern = re.compile(f"({'|'.join(spelled)})(\\s*)" if spelled else r"(?!)")

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """Yield each stretch of text and the token behind it; None at the end.

        The spaces a token takes along are cut off here and not looked for by the pattern: `\\s*` in
        front of a literal would be tried anew from every one of many spaces.
        """
        start = 0
        while match := self._pattern.search(text, start):
            token = self._tokens[match[1]]
            before = text[start : match.start()]
            yield before.rstrip() if token.lstrip else before, token
            start = match.end() if token.rstrip else match.end(1)
        yield text[start:], None

    def exchange(self, text: str, spell: Callable[[AddedToken], str]) -> str:
        """Spell every literal in a text anew."""
        return self._pattern.sub(lambda match: spell(self._tokens[match[1]]) + match[2], text)
