"""The bytes that words of a vocabulary stand for (used by `tokenizer.Tokenizer`).

Two alphabets: byte-level BPE (Qwen2, Llama 3) spells every byte as a letter of its own;
sentencepiece (Llama 2, Yi, Phi-3, InternLM2) writes text, U+2581 for a space, and `<0x0A>` for a
byte. Which one a tokenizer.json uses is told by its decoder; any other kind is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgvq_runtime.errors import TokenizerError
from mgvq_runtime.tokenizer.sentencepiece_model import SPACE

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Alphabet:
    """How words are to be read."""

    is_byte_level: bool
    strips_space: bool
    """Whether a text loses one space in front: the one that encoding put there."""
    has_byte_pieces: bool = False

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> Alphabet:
        """Tell the alphabet of a tokenizer.json.

        Raises:
            TokenizerError: if its model is not byte-pair encoding, or its decoder not known.
        """
        model, decoder = definition.get("model"), definition.get("decoder")
        model = model if isinstance(model, dict) else {}
        steps: Any = [decoder]
        if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
            steps = decoder.get("decoders")
        steps = [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
        kinds = [step.get("type") for step in steps]
        if model.get("type") == "BPE" and kinds == ["ByteLevel"]:
            return cls(is_byte_level=True, strips_space=False)
        replaces = [s for s in steps if s.get("type") == "Replace"]
        is_known = set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}
        if model.get("type") == "BPE" and is_known and len(replaces) == 1:
            pattern = replaces[0].get("pattern")
            if pattern == {"String": SPACE} and replaces[0].get("content") == " ":
                strips = any(s.get("type") == "Strip" and s.get("start") == 1 for s in steps)
                return cls(False, strips, "ByteFallback" in kinds)
        raise TokenizerError(
            f"its tokenizer is {model.get('type')} with decoder {kinds}; only byte-level BPE (BPE "
            "with decoder ByteLevel, as Qwen2 and Llama 3 have) and sentencepiece's BPE (decoder "
            "Replace, ByteFallback, Fuse, Strip, as Llama 2 and Phi-3 have) are supported"
        )

    def bytes_of(self, word: str) -> bytes:
        """Return the bytes of a word of the model's vocabulary."""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF[letter] for letter in word)
            except KeyError:
                return word.encode()
        if self.has_byte_pieces and (match := _BYTE_PIECE.fullmatch(word)):
            return bytes([int(match.group(1), 16)])
        return word.replace(SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's letters for the 256 bytes: printable Latin-1 as itself, the rest from U+0100.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
