"""Conversations with pictures, as the model will see them (called by `pipeline`).

In: LLaVA conversations (JSON lines or a JSON list, with pictures beside them, in a folder or a zip
file), a folder of pictures, or nothing (the checkpoint's own `calibration.zip`, else the bundled
pictures). Out: `Sample`s: token ids, positions, pictures, and which tokens are answers.
Not here: forwards (`statistics`), the exam (`questions`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgvq_quantizer.archive import PICTURE_SUFFIXES, Archive, DataError, read_rows
from mgvq_runtime.assets import demo_picture_paths
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.image import decode_image
from mgvq_runtime.request import ImageInput
from mgvq_runtime.tokenizer import Tokenizer

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_GENERIC_QUESTIONS = (
    "What is in this picture?",
    "Describe the picture.",
    "What colours do you see?",
    "How many objects are there?",
)

Message = dict[str, Any]


class CalibrationError(DataError):
    """There is nothing to calibrate on, or what there is cannot be used."""


@dataclass(frozen=True, eq=False)
class Conversation:
    """One row of a data file: messages, and where the pictures they mention are."""

    where: str
    """The place to name in messages: file and line."""
    messages: list[Message]
    """`{"role", "content"}`; content is text, or parts `{"type": "text"|"image"}`."""
    archive: Archive
    picture_names: tuple[str, ...]

    @functools.cached_property
    def pictures(self) -> tuple[bytes, ...]:
        """The bytes of its pictures, read when they are first asked for: few rows may be drawn.

        Raises:
            CalibrationError: naming file and line of a picture that cannot be read.
        """
        try:
            return tuple(map(self.archive.read_picture, self.picture_names))
        except DataError as error:
            raise CalibrationError(f"{self.where}: {error}") from error


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation in tokens."""

    where: str
    token_ids: npt.NDArray[np.int64]
    """`[T]`, placeholders expanded."""
    positions: npt.NDArray[np.int64]
    """`[3, T]`."""
    is_answer: npt.NDArray[np.bool_]
    """`[T]`: tokens the model would have to say, end tokens included."""
    images: tuple[ImageInput, ...]
    is_unanswered: bool = False
    """Whether its last answer is the end token alone: the data leave it to the model."""


def load_conversations(
    path: Path | None, model: Path, takes_pictures: bool = True
) -> tuple[str, list[Conversation]]:
    """Read calibration conversations.

    Args:
        path: a `.jsonl`, `.json` or `.zip` file or a folder; None takes `calibration.zip` of the
            model's folder, else generic questions on the bundled pictures.
        model: the folder of the model.
        takes_pictures: whether the model can be asked about pictures; else data must be given.

    Returns:
        A name for the data, and the conversations in the file's order.

    Raises:
        CalibrationError: if there is none, or a row cannot be used; names file and line.
    """
    if path is None:
        own = model / "calibration.zip"
        if not own.is_file() and not takes_pictures:
            raise CalibrationError(
                "a model that reads text alone has no data to be calibrated on here: give "
                "--calibration a .txt file of text, or a .jsonl file of conversations"
            )
        if not own.is_file():
            return "bundled pictures", _generic(list(demo_picture_paths()))
        path = own
    if not path.exists():
        raise CalibrationError(f"the calibration data {path} does not exist")
    if path.suffix in {".jsonl", ".json"}:
        archive, names = Archive(path.parent), [path.name]
    else:
        archive = Archive(path)
        names = [n for n in archive.names() if n.endswith((".jsonl", ".json"))]
    if not names and path.is_dir():
        return path.name, _generic([path / n for n in archive.names()])
    conversations = [
        _from_llava(archive, where, row)
        for name in names
        for where, row in read_rows(archive, name)
    ]
    if not conversations:
        raise CalibrationError(
            f"{path} holds no conversations: expected LLaVA rows in a .jsonl file"
        )
    return path.name, conversations


def fingerprint(conversations: Sequence[Conversation]) -> str:
    """Return a digest of everything the conversations say and show."""
    digest = hashlib.blake2b(digest_size=16)
    for conversation in conversations:
        digest.update(repr(conversation.messages).encode())
        for picture in conversation.pictures:
            digest.update(_digest(picture))
    return digest.hexdigest()


def prepare(
    conversations: Sequence[Conversation], processor: ChatProcessor, tokenizer: Tokenizer
) -> list[Sample]:
    """Turn conversations into samples; a picture that is shown twice is one object.

    Raises:
        CalibrationError: naming file and line of a picture that cannot be decoded, or of a
            conversation the chat template refuses.
    """
    end = end_of_turn(tokenizer)
    known: dict[Any, ImageInput] = {}
    samples = []
    for conversation in conversations:
        try:
            sample = _sample(conversation, processor, tokenizer, end)
        except DataError:
            raise
        except MgvqError as error:
            raise CalibrationError(f"{conversation.where}: {error}") from error
        pairs = zip(conversation.pictures, sample.images, strict=True)
        # With several pictures in a conversation a family may cut each into fewer tiles.
        images = tuple(known.setdefault((_digest(d), i.num_tokens), i) for d, i in pairs)
        samples.append(dataclasses.replace(sample, images=images))
    return samples


def show_other_pictures(samples: Sequence[Sample], copies: int, seed: int) -> list[Sample]:
    """Repeat conversations with other pictures of the same size in the places of their own.

    The answers in them are mostly wrong then, which does not matter to tuning: it compares what two
    models say, and both read the same.

    Args:
        samples: conversations; those without a picture are left out.
        copies: how often each is repeated.
        seed: of the draw.

    Returns:
        The new samples.
    """
    rng = np.random.default_rng(seed)
    sizes: dict[Any, list[ImageInput]] = {}
    for image in {id(i): i for sample in samples for i in sample.images}.values():
        sizes.setdefault((image.grid_thw, image.layout), []).append(image)

    def other(image: ImageInput) -> ImageInput:
        same = sizes[image.grid_thw, image.layout]
        return same[int(rng.integers(len(same)))]

    return [
        dataclasses.replace(sample, images=tuple(map(other, sample.images)))
        for _ in range(copies)
        for sample in samples
        if sample.images
    ]


def end_of_turn(tokenizer: Tokenizer) -> int:
    """Return the token that the chat template puts behind an answer.

    Raises:
        CalibrationError: if the template ends answers with none of the model's end tokens.
    """
    with_answer = tokenizer.encode_chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        add_generation_prompt=False,
    )
    ends = [token for token in with_answer if token in tokenizer.eos_token_ids]
    if not ends:
        raise CalibrationError(
            "the chat template puts none of the model's end tokens behind an answer: is "
            "generation_config.json missing?"
        )
    return ends[-1]


def parts_of(text: str) -> list[dict[str, str]]:
    """Cut a text at `<image>` into parts."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split("<image>")):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _sample(
    conversation: Conversation, processor: ChatProcessor, tokenizer: Tokenizer, end: int
) -> Sample:
    """Encode up to the last answer, and find the earlier ones in it."""
    images = [decode_image(picture) for picture in conversation.pictures]
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = processor.prepare(messages[:last], images)
    answer = [*tokenizer.encode(_text(messages[last])), end]
    start = len(prompt.token_ids)
    ids = np.array([*prompt.token_ids, *answer], dtype=np.int64)  # [T]
    tail = np.arange(start, len(ids)) + prompt.position_delta
    positions = np.concatenate([prompt.positions, np.tile(tail, (3, 1))], axis=1)  # [3, T]
    is_answer = np.zeros(len(ids), dtype=np.bool_)
    is_answer[start:] = True
    for i, message in enumerate(messages[:last]):
        if message["role"] == "assistant":
            pictures = prompt.images[: _count_pictures(messages[:i])]
            begin = _answer_start(messages[:last], i, tokenizer)
            begin += sum(picture.num_tokens - 1 for picture in pictures)
            stop = begin + int(np.argmax(ids[begin:] == end)) + 1
            is_answer[begin:stop] = True
    is_unanswered = not _text(messages[last])
    return Sample(conversation.where, ids, positions, is_answer, prompt.images, is_unanswered)


def _answer_start(messages: list[Message], index: int, tokenizer: Tokenizer) -> int:
    """Return how many tokens come before an answer, a picture counted as one.

    Found by exchanging the answer: what precedes it may depend on what follows, as InternVL2
    numbers pictures only where there are several.
    """
    other = "b" if _text(messages[index]).lstrip().startswith("a") else "a"
    changed = [*messages[:index], {**messages[index], "content": other}, *messages[index + 1 :]]
    pairs = zip(tokenizer.encode_chat(messages), tokenizer.encode_chat(changed), strict=False)
    return next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)


def _from_llava(archive: Archive, where: str, row: dict[str, Any]) -> Conversation:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise CalibrationError(f'{where}: expected "conversations", a list of turns (LLaVA format)')
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        text = turn.get("value") if role else None
        if role is None or not isinstance(text, str):
            raise CalibrationError(
                f'{where}: a turn must have "from" ({", ".join(_ROLES)}) and "value" (text)'
            )
        messages.append({"role": role, "content": parts_of(text) if role == "user" else text})
    named = row.get("image", row.get("images")) or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CalibrationError(f'{where}: "image" must be a file name or a list of them: {named!r}')
    if names and not _count_pictures(messages):
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise CalibrationError(f"{where}: nobody asks about its picture (no turn from human)")
        first["content"] = [{"type": "image"}] * len(names) + list(first["content"])
    if _count_pictures(messages) != len(names):
        raise CalibrationError(
            f"{where}: {_count_pictures(messages)} places say <image>, but {len(names)} pictures "
            "are named"
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise CalibrationError(f"{where}: nobody answers (no turn from gpt)")
    for name in names:
        try:
            archive.check_picture(name)
        except DataError as error:
            raise CalibrationError(f"{where}: {error}") from error
    return Conversation(where, messages, archive, tuple(names))


def _generic(files: Sequence[Path]) -> list[Conversation]:
    """Ask generic questions about pictures nobody described; the answers are left to the model."""
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise CalibrationError(
            "there is nothing to calibrate on: give --calibration a .jsonl or .zip file of LLaVA "
            "conversations, a .txt file of text, or a folder of pictures"
        )
    return [
        Conversation(
            where=f"{file.name}, question {i + 1}",
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question}],
                },
                {"role": "assistant", "content": ""},
            ],
            archive=Archive(file.parent),
            picture_names=(file.name,),
        )
        # One question after the other: every eighth, held out, is not always the same one.
        for i, question in enumerate(_GENERIC_QUESTIONS)
        for file in pictures
    ]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _text(message: Message) -> str:
    return str(message["content"])


def _count_pictures(messages: Sequence[Message]) -> int:
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
