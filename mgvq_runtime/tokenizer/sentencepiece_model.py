"""A sentencepiece `tokenizer.model` as the contents of a tokenizer.json (called by `folder`).

Llama's, Yi's, Phi-3's and InternLM2's first folders have nothing else. The file is a protocol
buffer; the few fields that matter are read here, so that neither sentencepiece nor protobuf is
needed to run a model. Only byte-pair models are converted. Executes nothing, trusts no length.

Source: google/sentencepiece, src/sentencepiece_model.proto; transformers 5.24
`convert_slow_tokenizer.SpmConverter.build_tokenizer_from_spm_proto`.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mgvq_runtime.errors import TokenizerError

SPACE = "\u2581"
"""What stands for a space in pieces."""

_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_MAX_PIECE_CHARS = 1000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says."""

    pieces: tuple[Piece, ...]
    is_bpe: bool
    has_byte_fallback: bool
    charsmap: bytes
    """A compiled normalization table, empty for none."""
    adds_dummy_prefix: bool
    """Whether text gets a space in front."""
    removes_extra_spaces: bool


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        TokenizerError: if the bytes are no such file.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                entry = dict(_fields(value))
                text, score = str(entry.get(1, b""), "utf-8"), float(entry.get(2, 0.0))
                if len(text) > _MAX_PIECE_CHARS:
                    raise ValueError(f"piece {len(pieces)} has {len(text)} characters")
                pieces.append(Piece(text, score, entry.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        charsmap = normalizer.get(2, b"")
        if not isinstance(charsmap, bytes):
            raise ValueError("its normalization table is a number")
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise TokenizerError(f"tokenizer.model is no sentencepiece model: {error}") from error
    if not pieces:
        raise TokenizerError("tokenizer.model is no sentencepiece model: it holds no pieces")
    return SentencePieceModel(
        tuple(pieces),
        is_bpe=trainer.get(3, 1) == _BPE,
        has_byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap,
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
    )


def to_definition(
    model: SentencePieceModel, renamed: dict[int, str], is_legacy: bool
) -> dict[str, Any]:
    """Write a model as the contents of a tokenizer.json.

    Args:
        model: From `parse_model`.
        renamed: Added tokens by id; those within the vocabulary take a piece's place.
        is_legacy: Whether each stretch of text between special tokens gets the dummy prefix, or
            only one at the very beginning.

    Raises:
        TokenizerError: if it is not a byte-pair model.
    """
    if not model.is_bpe:
        raise TokenizerError("tokenizer.model is not a byte-pair (BPE) model; others are not read")
    pieces = model.pieces
    vocab = {renamed.get(number, piece.text): number for number, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, piece)
            for number, piece in enumerate(pieces)
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and number not in renamed
        ],
        "normalizer": _normalizer(model, is_legacy),
        "pre_tokenizer": _pre_tokenizer(model, is_legacy),
        "post_processor": None,
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.has_byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces, renamed.keys()),
        },
    }


def _merges(pieces: Collection[Piece], renamed: Collection[int]) -> list[list[str]]:
    """Return every pair of pieces that makes a piece, the best score of the result first."""
    normal = {
        piece.text: (-piece.score, number)
        for number, piece in enumerate(pieces)
        if piece.kind == _NORMAL and number not in renamed
    }
    pairs = [
        (*rank, text[:place], text[place:])
        for text, rank in normal.items()
        for place in range(1, len(text))
        if text[:place] in normal and text[place:] in normal
    ]
    return [[left, right] for _, _, left, right in sorted(pairs)]


def _normalizer(model: SentencePieceModel, is_legacy: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        table = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if model.removes_extra_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.adds_dummy_prefix and is_legacy:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(model: SentencePieceModel, is_legacy: bool) -> dict[str, Any] | None:
    if is_legacy or not model.adds_dummy_prefix:
        return None
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _added(number: int, piece: Piece) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    is_special = piece.kind != _USER_DEFINED
    # The file does not tell turns of a conversation from other symbols.
    return {"id": number, "content": piece.text, **flags, "special": is_special, "typable": False}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field numbers and values of one message of a protocol buffer.

    Raises:
        ValueError: if the bytes end within a field, or its type is not known.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire_type = key >> 3, key & 7
        value: Any
        if wire_type == _VARINT:
            value, place = _varint(data, place)
        elif wire_type == _BYTES:
            length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        elif wire_type == _FIXED32:
            (value,), place = struct.unpack("<f", data[place : place + 4]), place + 4
        elif wire_type == _FIXED64:
            value, place = None, place + 8
        else:
            raise ValueError(f"field {number} has the unknown type {wire_type}")
        if place > len(data):
            raise ValueError(f"field {number} ends behind the end of the file")
        yield number, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return a variable-length integer and the place behind it."""
    value = shift = 0
    while shift < 64:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("an integer is longer than 64 bits")
