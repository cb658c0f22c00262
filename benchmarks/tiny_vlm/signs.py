"""Pictures that are read: words in many fonts and handwritten numbers (called by `drawing`).

Words are drawn and answered in capitals, letter by letter. Not here: charts.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import COLOURS
from benchmarks.tiny_vlm.phrases import ask
from benchmarks.tiny_vlm.pictures import (
    QA,
    Array,
    Box,
    Picture,
    background,
    font,
    ground_questions,
    ink_colour,
    jittered,
    paste,
    resized,
    text_mask,
    tint,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
SMALL_CAPITALS = 11
"""Words whose letters are at most this many pixels high are the kind `small_word`."""


def random_text(rng: Random, assets: Assets) -> str:
    """One or two letters, or a short word; in training also three random letters."""
    form = rng.random()
    if form < 0.7:
        return "".join(rng.choice(LETTERS) for _ in range(1 if form < 0.4 else 2))
    if assets.split == "train" and form < 0.78:
        return "".join(rng.choice(LETTERS) for _ in range(3))
    text = rng.choice(assets.words)
    while len(text) > 4 or (len(text) > 3 and rng.random() < 0.8):
        text = rng.choice(assets.words)
    return text


def _fitted_mask(
    rng: Random, text: str, path: str, room: tuple[int, int], low: int
) -> Array | None:
    """Text at a random size that fits into `room` (height, width), or None."""
    biggest = min(room[0], 46)
    size = rng.randint(low, max(low, biggest))
    for _ in range(6):
        mask = text_mask(text, path, size)
        if mask.shape[0] <= room[0] and mask.shape[1] <= room[1]:
            return mask
        size = int(size * min(room[0] / mask.shape[0], room[1] / mask.shape[1], 0.95))
        if size < 9:
            return None
    return None


def word_sign(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One to three words on top of each other."""
    canvas, ground = background(rng, height, width)
    lines = 1 if height < 80 else rng.choice((1, 1, 1, 2))
    path = rng.choice(assets.fonts)
    small = rng.random() < 0.15
    texts, heights = [], []
    boxes: list[Box] = []
    colour = ink_colour(rng, canvas)
    band = height / lines
    for line in range(lines):
        text = random_text(rng, assets)
        room = (int(band * 0.92), int(width * 0.94))
        mask = None
        if small:
            mask = text_mask(text, path, rng.randint(12, 15))
            mask = mask if mask.shape[1] <= room[1] else None
        if mask is None:
            mask = _fitted_mask(rng, text, path, room, 20)
        if mask is None:
            text = text[:3]
            mask = text_mask(text, path, 12)
        if rng.random() < 0.2 and lines == 1:
            mask = _turned(rng, mask, room)
        x = rng.randint(0, max(0, width - mask.shape[1]))
        y = int(line * band) + rng.randint(0, max(0, int(band) - mask.shape[0]))
        paste(canvas, tint(mask, jittered(rng, colour)), x, y)
        boxes += letter_boxes(text, path, mask, x, y, colour)
        texts.append(text)
        heights.append(mask.shape[0])
    picture = Picture(canvas, boxes=boxes)
    kind = "small_word" if max(heights) <= SMALL_CAPITALS else "word"
    picture.questions += _word_questions(rng, texts, kind)
    picture.questions.append(
        QA(
            "colour",
            ask(rng, "colour", x=rng.choice(("text", "writing"))),
            colour,
            1 / len(COLOURS),
        )
    )
    picture.questions += ground_questions(rng, ground)
    if lines == 1:
        picture.subject = f"the word {texts[0]}"
        at = tuple(range(len(texts[0])))
        question = ask(rng, "caption")
        picture.questions.append(QA(kind, question, picture.subject, 0.0, (), at, True))
    return picture


def letter_boxes(text: str, path: str, mask: Array, x: int, y: int, colour: str) -> list[Box]:
    """Where each letter of a drawn line is, from the font's advances."""
    face = font(path, 32)
    ends = [face.getlength(text[: count + 1]) for count in range(len(text))]
    scale = mask.shape[1] / ends[-1]
    starts = [0.0, *ends[:-1]]
    bottom = y + mask.shape[0]
    return [
        Box(x + start * scale, y, x + end * scale, bottom, letter, colour)
        for letter, start, end in zip(text, starts, ends, strict=True)
    ]


def _turned(rng: Random, mask: Array, room: tuple[int, int]) -> Array:
    picture = Image.fromarray(mask).rotate(
        rng.uniform(-5, 5), expand=True, resample=Image.Resampling.BILINEAR
    )
    turned = np.asarray(picture)
    return turned if turned.shape[0] <= room[0] and turned.shape[1] <= room[1] else mask


def _word_questions(rng: Random, texts: list[str], kind: str) -> list[QA]:
    result = []
    if len(texts) == 1:
        text = texts[0]
        every = tuple(range(len(text)))
        result.append(QA(kind, ask(rng, "word"), text, 0.0, (), every, True))
        index = rng.randrange(len(text))
        letter = ask(rng, "letter_at", o=ORDINALS[index])
        result.append(QA("letter", letter, text[index], 1 / 26, at=(index,)))
        result.append(
            QA("letter", ask(rng, "letter_at", o="last"), text[-1], 1 / 26, at=every[-1:])
        )
        result.append(QA("letter", ask(rng, "letter_at", o="first"), text[0], 1 / 26, at=(0,)))
        result.append(QA("letter", ask(rng, "letter_count"), str(len(text)), 1 / 5))
        return result
    places = ("top", "bottom") if len(texts) == 2 else ("top", "middle", "bottom")
    start = 0
    for place, text in zip(places, texts, strict=True):
        at = tuple(range(start, start + len(text)))
        start += len(text)
        result.append(QA(kind, ask(rng, "word_at", p=place), text, 0.0, (), at, True))
    result.append(QA(kind, ask(rng, "word"), " ".join(texts), 0.0))
    return result


def handwritten_number(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One to four MNIST digits in a row."""
    canvas, ground = background(rng, height, width)
    most = max(1, min(4, width // 26))
    count = min(most, rng.choice((1, 1, 1, 2, 2, 3)))
    side = min(height / 0.9, width / (count * 0.78 + 0.25), 64)
    size = max(20, int(side * rng.uniform(0.72, 1.0)))
    step = int(size * rng.uniform(0.74, 0.86))
    length = step * (count - 1) + size
    x = rng.randint(min(0, width - length), max(0, width - length))
    y = rng.randint(min(0, height - size), max(0, height - size))
    colour = ink_colour(rng, canvas)
    digits = []
    boxes: list[Box] = []
    for place in range(count):
        index = rng.randrange(len(assets.digits))
        mask = resized(assets.digits[index], size)
        wobble = rng.randint(-size // 14, size // 14)
        paste(canvas, tint(mask, jittered(rng, colour)), x + place * step, y + wobble)
        digits.append(int(assets.digit_labels[index]))
        left, top = x + place * step + 0.15 * size, y + wobble + 0.1 * size
        box = Box(left, top, left + 0.7 * size, top + 0.8 * size, str(digits[-1]), colour)
        boxes.append(box)
    text = "".join(map(str, digits))
    picture = Picture(canvas, subject=f"the number {text}", boxes=boxes)
    picture.questions += _number_questions(rng, digits, text)
    name = "digit" if count == 1 else "number"
    question = ask(rng, "colour", x=name)
    picture.questions.append(QA("colour", question, colour, 1 / len(COLOURS)))
    picture.questions += ground_questions(rng, ground)
    return picture


def _number_questions(rng: Random, digits: list[int], text: str) -> list[QA]:
    chance = 0.1 ** len(digits)
    every = tuple(range(len(digits)))
    result = [QA("number", ask(rng, "number"), text, chance, (), every, True)]
    caption = f"the number {text}"
    result.append(QA("number", ask(rng, "caption"), caption, chance, (), every, True))
    result.append(QA("count", ask(rng, "digit_count"), str(len(digits)), 1 / 4))
    if len(digits) == 1:
        result.append(QA("number", ask(rng, "digit"), text, 0.1, at=(0,)))
        return result
    index = rng.randrange(len(digits))
    question = ask(rng, "digit_at", o=ORDINALS[index])
    result.append(QA("number", question, text[index], 0.1, at=(index,)))
    result.append(QA("number", ask(rng, "digit_at", o="last"), text[-1], 0.1, at=every[-1:]))
    if len(digits) == 2:
        question = ask(rng, "sum")
        result.append(QA("sum", question, str(sum(digits)), 1 / 19, every[:1], every[1:]))
    return result
