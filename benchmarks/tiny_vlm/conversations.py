"""Samples as token rows: independent questions on a picture, or whole conversations.

Called by `train` (batches), `train_tokenizer` (text) and `build_sets`. Both forms are Qwen2-VL's
chat template to the token. A prefix sample shares system turn and picture between question blocks
that cannot see each other; packing them causally would leak one answer into the next question, and
the model would never look at the picture. A single conversation is one causal row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import COLOURS, dense_classes
from benchmarks.tiny_vlm.drawing import MIX, choose_type, draw
from benchmarks.tiny_vlm.looks import Look, Looks, covered, looks_of, packed
from benchmarks.tiny_vlm.patches import MERGE, PATCH
from benchmarks.tiny_vlm.phrases import ask
from benchmarks.tiny_vlm.pictures import QA, Array, Box, Picture
from benchmarks.tiny_vlm.smalltalk import SYSTEM_PROMPTS, text_pair

DEFAULT_SYSTEM = "You are a helpful assistant."
ORDINALS = ("first", "second", "third")
DENSE_CLASSES = {name: number for number, name in enumerate(dense_classes())}
COLOUR_NUMBERS = {name: number for number, name in enumerate(COLOURS)}


@dataclass
class Turn:
    """One message: text with `<image>` where a picture stands."""

    role: str
    text: str
    item: QA | None = None
    """Of an answer about a picture: which of its boxes say so."""
    picture: int = 0
    """Number of that picture in the conversation."""


@dataclass
class Row:
    """One row of a batch under construction."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    next_position: int = 0

    def add(self, ids: list[int], block: int, is_answer: bool = False) -> None:
        """Append text tokens; answers are what the loss looks at."""
        self.tokens += ids
        self.labels += ids if is_answer else [-100] * len(ids)
        start = self.next_position
        self.positions += [(start + i,) * 3 for i in range(len(ids))]
        self.blocks += [block] * len(ids)
        self.next_position += len(ids)

    def add_image(self, pad: int, rows: int, columns: int, block: int) -> None:
        """Append the placeholder tokens of a picture, with M-RoPE positions."""
        start = self.next_position
        self.tokens += [pad] * (rows * columns)
        self.labels += [-100] * (rows * columns)
        self.positions += [
            (start, start + r, start + c) for r in range(rows) for c in range(columns)
        ]
        self.blocks += [block] * (rows * columns)
        self.next_position += max(rows, columns)


class Encoder:
    """The tokenizer with the handful of id sequences that every row needs."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        self.image_pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.pad = self.tokenizer.token_to_id("<|endoftext|>")
        self.end = self.tokenizer.token_to_id("<|im_end|>")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)

    def ids(self, text: str) -> list[int]:
        """Ids of a text, special tokens included."""
        return list(self.encode(text))

    def prefix_row(
        self, grid: tuple[int, int], questions: list[QA], boxes: Sequence[Box] = ()
    ) -> Row:
        """One picture, then independent question blocks; with `boxes` also where answers are."""
        row = Row()
        head = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        row.add(self.ids(head), 0)
        things = [covered(box, grid, len(row.tokens)) for box in boxes]
        row.add_image(self.image_pad, *grid, 0)
        row.add(self.ids("<|vision_end|>"), 0)
        start = row.next_position
        for block, item in enumerate(questions, start=1):
            row.next_position = start
            row.add(self.ids(item.question), block)
            row.add(self.ids("<|im_end|>\n<|im_start|>assistant\n"), block)
            answer = self.ids(item.answer)
            if things:
                row.looks += looks_of(item, things, len(row.tokens) - 1, len(answer))
            row.add([*answer, self.end], block, is_answer=True)
        return row

    def chat_row(
        self, turns: list[Turn], grid: tuple[int, int], boxes: Sequence[Sequence[Box]] = ()
    ) -> Row:
        """A whole conversation as one causal row; `boxes` of each picture tell where to look."""
        row = Row()
        things: list[list[tuple[int, ...]]] = []
        for turn in turns:
            row.add(self.ids(f"<|im_start|>{turn.role}\n"), 0)
            if turn.role == "assistant":
                answer = self.ids(turn.text)
                if turn.item and boxes:
                    query = len(row.tokens) - 1
                    row.looks += looks_of(turn.item, things[turn.picture], query, len(answer))
                row.add([*answer, self.end], 0, is_answer=True)
                row.add(self.ids("\n"), 0)
                continue
            for number, part in enumerate(turn.text.split("<image>")):
                if number:
                    row.add(self.ids("<|vision_start|>"), 0)
                    if boxes:
                        first = len(row.tokens)
                        things.append([covered(box, grid, first) for box in boxes[len(things)]])
                    row.add_image(self.image_pad, *grid, 0)
                    row.add(self.ids("<|vision_end|>"), 0)
                if part:
                    row.add(self.ids(part), 0)
            row.add(self.ids("<|im_end|>\n"), 0)
        return row


def with_image(rng: Random, text: str) -> str:
    """Text and picture in one of the orders people use."""
    forms = ("<image>{}", "<image>{}", "<image>\n{}", "{}<image>", "{}\n<image>", "{} <image>")
    return rng.choice(forms).format(text)


class Pair(NamedTuple):
    """A question on several pictures."""

    question: str
    answer: str
    picture: int
    """Number of the picture that it is about, or -1."""


def several_pairs(rng: Random, pictures: list[Picture]) -> list[Pair]:
    """Questions and answers about two or three pictures together, in random order."""
    pairs: list[Pair] = []
    subjects = [picture.subject for picture in pictures]
    for index, picture in enumerate(pictures):
        if picture.subject:
            answer = picture.subject
            pairs.append(Pair(ask(rng, "nth", o=ORDINALS[index]), answer, index))
            if subjects.count(picture.subject) == 1:
                answer = f"the {ORDINALS[index]}"
                pairs.append(Pair(ask(rng, "which", x=picture.subject), answer, index))
    pairs.append(Pair(ask(rng, "pictures"), str(len(pictures)), -1))
    rng.shuffle(pairs)
    pairs.sort(key=lambda pair: pair.answer.isdigit() and rng.random() < 0.7)
    return pairs


def _several(rng: Random, pictures: list[Picture]) -> list[Turn]:
    """A conversation about two or three pictures."""
    numbered = rng.random() < 0.35
    marks = [f"Picture {i + 1}: <image>" if numbered else "<image>" for i in range(len(pictures))]
    shown = "".join(marks)
    pairs = several_pairs(rng, pictures)
    turns: list[Turn] = []
    for number, (question, answer, index) in enumerate(pairs[: rng.randint(1, 3)]):
        text = question
        if number == 0:
            text = rng.choice((f"{shown}{question}", f"{shown}\n{question}", f"{question}{shown}"))
        every = tuple(range(len(pictures[index].boxes))) if index >= 0 else ()
        item = QA("several", question, answer, 0.0, every, every)
        turns += [Turn("user", text), Turn("assistant", answer, item, max(0, index))]
    return turns


def conversation(
    rng: Random, assets: Assets, size: tuple[int, int]
) -> tuple[list[Turn], list[Picture]]:
    """One conversation as users hold it, and its pictures in order."""
    turns: list[Turn] = []
    default = rng.random() < 0.8
    turns.append(Turn("system", DEFAULT_SYSTEM if default else rng.choice(SYSTEM_PROMPTS)))
    form = rng.random()
    if form < 0.2:
        for _ in range(rng.randint(1, 3)):
            question, answer = text_pair(rng)
            turns += [Turn("user", question), Turn("assistant", answer)]
        return turns, []
    if rng.random() < 0.1:
        question, answer = text_pair(rng)
        turns += [Turn("user", question), Turn("assistant", answer)]
    if form < 0.55:
        count = 2 if rng.random() < 0.7 or size[0] * size[1] > 28_000 else 3
        pictures = [draw(rng, assets, choose_type(rng, size), size) for _ in range(count)]
        return turns + _several(rng, pictures), pictures
    picture = draw(rng, assets, choose_type(rng, size), size)
    while not picture.questions:
        picture = draw(rng, assets, choose_type(rng, size), size)
    asked = rng.sample(picture.questions, min(len(picture.questions), rng.randint(1, 3)))
    for number, item in enumerate(asked):
        text = with_image(rng, item.question) if number == 0 else item.question
        turns += [Turn("user", text), Turn("assistant", item.answer, item)]
    return turns, [picture]


@dataclass
class Batch:
    """One micro-batch as arrays; see `model.TinyVLM.forward` for the shapes."""

    tokens: Array
    labels: Array
    positions: Array
    blocks: Array
    images: Array
    """`[N, H, W, 3]` uint8, those of the rows first, then those for the dense labels only."""
    row_images: int
    """How many of them belong to the rows."""
    dense_classes: Array
    """`[N, P]` dense class of each patch, in merge order; -100 where not known."""
    dense_colours: Array
    """`[N, P]` colour number of each patch that shows a drawn thing of one colour, else -100."""
    dense_partners: Array
    """`[N, P]` dense class of what belongs to what a patch shows, else -100."""
    looks: Looks


def make_batch(
    rng: Random,
    assets: Assets,
    encoder: Encoder,
    size: tuple[int, int],
    rows: int,
    questions: int,
    conversation_share: float,
    extra_pictures: int = 0,
) -> Batch:
    """Draw and encode one micro-batch of pictures of one size."""
    if size not in MIX:
        raise ValueError(f"{size} is no size of the mix; the sizes are {sorted(MIX)}")
    grid = (size[0] // (PATCH * MERGE), size[1] // (PATCH * MERGE))
    built: list[Row] = []
    shown: list[Picture] = []
    while len(built) < rows:
        if rng.random() < conversation_share:
            turns, pictures = conversation(rng, assets, size)
            boxes = [picture.boxes for picture in pictures]
            built.append(encoder.chat_row(turns, grid, boxes))
            shown += pictures
            continue
        picture = draw(rng, assets, choose_type(rng, size), size)
        if picture.questions:
            asked = rng.sample(picture.questions, min(questions, len(picture.questions)))
            built.append(encoder.prefix_row(grid, asked, picture.boxes))
            shown.append(picture)
    row_images = len(shown)
    shown += [draw(rng, assets, choose_type(rng, size), size) for _ in range(extra_pictures)]
    batch = _padded(built, [picture.pixels for picture in shown], size, encoder.pad)
    batch.row_images = row_images
    labels = zip(*(dense_labels(picture) for picture in shown), strict=True)
    batch.dense_classes, batch.dense_colours, batch.dense_partners = map(np.stack, labels)
    return batch


def dense_labels(picture: Picture) -> tuple[Array, Array, Array]:
    """Class, colour and partner's class of every patch of a picture, in merge order.

    A patch shows what the box over its middle shows. Pictures without boxes are not labelled.
    """
    rows, columns = picture.pixels.shape[0] // PATCH, picture.pixels.shape[1] // PATCH
    classes = np.full((rows, columns), 0 if picture.boxes else -100, dtype=np.int64)
    colours = np.full((rows, columns), -100, dtype=np.int64)
    partners = np.full((rows, columns), -100, dtype=np.int64)
    half = PATCH / 2
    for box in picture.boxes:
        top, bottom = math.ceil((box.top - half) / PATCH), (box.bottom - half) // PATCH
        left, right = math.ceil((box.left - half) / PATCH), (box.right - half) // PATCH
        down = slice(max(0, top), max(0, int(bottom) + 1))
        across = slice(max(0, left), max(0, int(right) + 1))
        classes[down, across] = DENSE_CLASSES[box.dense_class]
        if box.colour:
            colours[down, across] = COLOUR_NUMBERS[box.colour]
        if box.partner:
            partners[down, across] = DENSE_CLASSES[box.partner]
    return in_merge_order(classes), in_merge_order(colours), in_merge_order(partners)


def in_merge_order(x: Array) -> Array:
    """A grid of patches `[rows, columns]` as `[P]` in Qwen2-VL's order of 2x2 blocks."""
    rows, columns = x.shape
    blocks = x.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)


def place_labels(batch: Batch) -> tuple[Array, Array]:
    """Where shown things are: 0 or 1 for top or bottom, and for left or right, else -100."""
    N, H, W, _ = batch.images.shape

    def side(count: int) -> Array:
        middle = (np.arange(count) + 0.5) / count
        return np.where(middle < 0.4, 0, np.where(middle > 0.6, 1, -100))

    shape = (H // PATCH, W // PATCH)
    vertical = np.broadcast_to(side(shape[0])[:, None], shape)
    horizontal = np.broadcast_to(side(shape[1])[None], shape)
    shown = batch.dense_classes > 0
    return tuple(np.where(shown, in_merge_order(s)[None], -100) for s in (vertical, horizontal))


def _padded(rows: list[Row], images: list[Array], size: tuple[int, int], pad: int) -> Batch:
    longest = max((len(row.tokens) for row in rows), default=0)
    B, L = len(rows), -(-longest // 16) * 16
    tokens = np.full((B, L), pad, dtype=np.int64)
    labels = np.full((B, L), -100, dtype=np.int64)
    positions = np.zeros((3, B, L), dtype=np.int64)
    blocks = np.full((B, L), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = row.tokens
        labels[index, : length - 1] = row.labels[1:]  # the target stands where it is predicted
        positions[:, index, :length] = np.array(row.positions).T
        blocks[index, :length] = row.blocks
    stacked = np.stack(images) if images else np.zeros((0, *size, 3), dtype=np.uint8)
    none = np.zeros((0, 0), dtype=np.int64)
    looks = packed([row.looks for row in rows], L)
    return Batch(tokens, labels, positions, blocks, stacked, len(stacked), none, none, none, looks)
