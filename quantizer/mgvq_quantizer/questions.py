"""Questions on pictures with known answers (called by `evaluate`).

In: a zip file or folder with `questions.jsonl` (`id`, `kind`, `images`, `question`, `answer`) and
the pictures. Out: `Question`s that share pictures stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mgvq_quantizer.archive import Archive, DataError, read_rows
from mgvq_quantizer.calibration import Message, parts_of

FILE_NAME = "questions.zip"


@dataclass(frozen=True)
class Question:
    """One question and the answer that counts as right."""

    where: str
    kind: str
    images: tuple[str, ...]
    """Paths inside the question file."""
    text: str
    """With `<image>` where a picture stands; without, the pictures come first."""
    answer: str

    @property
    def messages(self) -> list[Message]:
        """The conversation that asks it."""
        text = self.text if "<image>" in self.text else "<image>" * len(self.images) + self.text
        return [{"role": "user", "content": parts_of(text)}]


def find_questions(given: Path | None, folders: Sequence[Path]) -> Path:
    """Return the question file to use.

    Args:
        given: what the user named, or None.
        folders: checkpoint folders that may bring one, best first.

    Raises:
        DataError: if there is none.
    """
    if given is not None:
        if not given.exists():
            raise DataError(f"the question file {given} does not exist")
        return given
    for folder in folders:
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    raise DataError(
        f"neither {' nor '.join(map(str, folders))} brings a {FILE_NAME}: name one with --questions"
    )


def load_questions(archive: Archive, limit: int | None, seed: int) -> list[Question]:
    """Read questions, questions on the same pictures side by side.

    Args:
        archive: the opened question file.
        limit: most questions; they are drawn at random. None takes all.
        seed: of the draw.

    Raises:
        DataError: if there are none, or a row lacks a field; names the line.
    """
    names = [name for name in archive.names() if name.endswith(".jsonl")]
    questions = [_read(where, row) for name in names for where, row in read_rows(archive, name)]
    if not questions:
        raise DataError(f"{archive.path} holds no questions: expected rows in a .jsonl file")
    if limit is not None and limit < len(questions):
        questions = Random(seed).sample(questions, limit)
    return sorted(questions, key=lambda question: question.images)


def _read(where: str, row: dict[str, Any]) -> Question:
    images = row.get("images", row.get("image", []))
    images = [images] if isinstance(images, str) else images
    text, answer = row.get("question"), row.get("answer")
    if not isinstance(text, str) or not isinstance(answer, str) or not answer:
        raise DataError(f'{where}: a question needs "question" and "answer", both text')
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise DataError(f'{where}: "images" must be a list of file names')
    if "<image>" in text and text.count("<image>") != len(images):
        raise DataError(
            f"{where}: {text.count('<image>')} places say <image>, {len(images)} pictures are named"
        )
    return Question(where, str(row.get("kind", "all")), tuple(images), text, answer)
