"""Plain text as samples of one length (called by `dataset` and `evaluate_text`).

In: `.txt` files, alone, in a folder or in a zip file. Out: passages of at most `PASSAGE_TOKENS`
tokens, and samples of them: no chat template, and every token but the first, which nothing comes
before, is one the model would have to say. Not here: conversations (`calibration`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgvq_quantizer.archive import PICTURE_SUFFIXES, Archive
from mgvq_quantizer.calibration import CalibrationError, Sample
from mgvq_runtime.tokenizer import Tokenizer

PASSAGE_TOKENS = 512
"""Tokens of a sample: of 512 and more, each is predicted from a few hundred on average."""
_SUFFIX = ".txt"
_DATA_SUFFIXES = (".jsonl", ".json", *PICTURE_SUFFIXES)


@dataclass(frozen=True, eq=False)
class Passage:
    """Some tokens in a row."""

    where: str
    """The place to name in messages: file and first token."""
    token_ids: npt.NDArray[np.int64]
    """`[T]`, at least 2."""


def holds_text(path: Path | None) -> bool:
    """Return whether calibration data is a text file, or a folder or zip file with some in it."""
    if path is None or path.suffix == _SUFFIX:
        return path is not None
    if path.suffix in (".jsonl", ".json") or not path.exists():
        return False
    return any(name.endswith(_SUFFIX) for name in Archive(path).names())


def holds_conversations(path: Path | None) -> bool:
    """Return whether calibration data is anything but text; the default data, None, is."""
    if path is None or not holds_text(path):
        return True
    if path.suffix == _SUFFIX:
        return False
    return any(name.lower().endswith(_DATA_SUFFIXES) for name in Archive(path).names())


def read_passages(path: Path, tokenizer: Tokenizer) -> list[Passage]:
    """Cut every text of a file, folder or zip file into passages.

    A text ends its last passage: what is left over is dropped, unless it is the whole text.

    Raises:
        CalibrationError: if a file is not UTF-8 text, or none has two tokens.
    """
    if not path.exists():
        raise CalibrationError(f"the text {path} does not exist")
    is_file = path.suffix == _SUFFIX and path.is_file()
    archive = Archive(path.parent if is_file else path)
    names = [path.name] if is_file else [n for n in archive.names() if n.endswith(_SUFFIX)]
    passages: list[Passage] = []
    for name in names:
        try:
            text = archive.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{archive.path}: {name!r} is not UTF-8 text: {error}"
            ) from error
        passages += cut(name, np.array(tokenizer.encode(text), dtype=np.int64))
    if not passages:
        raise CalibrationError(
            f"{path} holds no text of two tokens or more: expected .txt files in UTF-8"
        )
    return passages


def cut(name: str, token_ids: npt.NDArray[np.int64]) -> list[Passage]:
    """Cut a text's tokens `[T]` into passages."""
    whole = max(len(token_ids) // PASSAGE_TOKENS, int(len(token_ids) > 1))
    starts = range(0, whole * PASSAGE_TOKENS, PASSAGE_TOKENS)
    return [
        Passage(f"{name}, token {start}", token_ids[start : start + PASSAGE_TOKENS])
        for start in starts
    ]


def text_sample(passage: Passage) -> Sample:
    """Return a passage as a sample whose every token counts as an answer but the first."""
    length = len(passage.token_ids)
    return Sample(
        where=passage.where,
        token_ids=passage.token_ids,
        positions=np.tile(np.arange(length), (3, 1)),
        is_answer=np.arange(length) > 0,
        images=(),
    )


def fingerprint(passages: Sequence[Passage]) -> str:
    """Return a digest of all tokens, passage by passage."""
    digest = hashlib.blake2b(digest_size=16)
    for passage in passages:
        digest.update(len(passage.token_ids).to_bytes(8))
        digest.update(passage.token_ids.tobytes())
    return digest.hexdigest()
