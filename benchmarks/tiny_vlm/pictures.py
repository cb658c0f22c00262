"""Drawing primitives on `[H, W, 3]` uint8 canvases (called by `scenes`, `signs` and `charts`).

A sprite is `[s, s, 4]` uint8 (colour and alpha); masks of the drawn shapes are made once with
supersampling and kept. Not here: what is put where and what is asked about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.tiny_vlm.concepts import COLOURS
from benchmarks.tiny_vlm.phrases import ask

Array = np.ndarray
Rgb = tuple[int, int, int]


class QA(NamedTuple):
    """One question on a picture."""

    kind: str
    question: str
    answer: str
    chance: float
    """Share a blind guess among the possible answers gets right."""
    via: tuple[int, ...] = ()
    """Numbers of the picture's boxes that must be found first, such as the thing asked about."""
    at: tuple[int, ...] = ()
    """Numbers of the boxes that the answer is read from."""
    is_spelled: bool = False
    """Whether `at` has one box for each of the answer's last tokens, such as a word's letters."""


class Box(NamedTuple):
    """Where something was drawn: pixels from the top left, its dense class, its colour.

    `partner` is the dense class of what belongs to it, such as a bar's letter.
    """

    left: float
    top: float
    right: float
    bottom: float
    dense_class: str
    colour: str
    partner: str = ""


@dataclass
class Picture:
    """Pixels, what may be asked of them, and a noun phrase for what they show."""

    pixels: Array
    questions: list[QA] = field(default_factory=list)
    subject: str = ""
    """Such as `a dog`; empty if no short phrase says what the picture shows."""
    boxes: list[Box] = field(default_factory=list)
    """Truth for the dense labels of training; empty where it is not known."""


def jittered(rng: Random, name: str) -> Rgb:
    """A named colour, slightly off."""
    spread = 5 if name in ("black", "white", "gray") else 16
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in COLOURS[name])
    return r, g, b


def distance(first: Rgb, second: Rgb) -> float:
    """Rough visual distance of two colours."""
    return math.dist(first, second)


def background(rng: Random, height: int, width: int) -> tuple[Array, str]:
    """A plain, shaded or grainy ground, and the name of its colour (empty for odd tints)."""
    style = rng.random()
    name = ""
    if style < 0.45:
        name = "white"
        colour = jittered(rng, name)
    elif style < 0.65:
        name = rng.choice(("black", "gray", "yellow", "cyan", "pink", "blue"))
        colour = jittered(rng, name)
    else:
        low, high = (10, 70) if rng.random() < 0.1 else (195, 255)
        colour = (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = colour
    if rng.random() < 0.1:
        shade = np.linspace(0, rng.uniform(-30, 30), height)[:, None, None]
        canvas = np.clip(canvas + shade, 0, 255).astype(np.uint8)
    if rng.random() < 0.1:
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-10, 11, (height, width, 1))
        canvas = np.clip(canvas.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return canvas, name


def ground_questions(rng: Random, ground: str) -> list[QA]:
    """Half the time the question what colour the ground is, if that colour has a name."""
    if not ground or rng.random() < 0.5:
        return []
    return [QA("colour", ask(rng, "ground"), ground, 1 / len(COLOURS))]


def mean_colour(canvas: Array) -> Rgb:
    """Average colour of a canvas."""
    r, g, b = (int(x) for x in canvas[::4, ::4].reshape(-1, 3).mean(axis=0))
    return r, g, b


def ink_colour(rng: Random, canvas: Array) -> str:
    """A colour to write with: mostly black or white, whichever stands out, else any that does."""
    if rng.random() < 0.6:
        return "black" if distance(mean_colour(canvas), (0, 0, 0)) > 220 else "white"
    return rng.choice(visible_colours(canvas, 130.0) or ["black"])


def visible_colours(canvas: Array, minimum: float = 95.0) -> list[str]:
    """Names of the colours that stand out from the ground."""
    ground = mean_colour(canvas)
    return [name for name, rgb in COLOURS.items() if distance(rgb, ground) >= minimum]


def paste(canvas: Array, sprite: Array, x: int, y: int) -> None:
    """Blend an RGBA sprite with its top left corner at (x, y); parts outside are cut."""
    height, width = canvas.shape[:2]
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + sprite.shape[1]), min(height, y + sprite.shape[0])
    if right <= left or bottom <= top:
        return
    part = sprite[top - y : bottom - y, left - x : right - x].astype(np.int32)
    region = canvas[top:bottom, left:right].astype(np.int32)
    alpha = part[..., 3:]
    region += (part[..., :3] - region) * alpha // 255
    canvas[top:bottom, left:right] = region.astype(np.uint8)


def tint(mask: Array, colour: Rgb) -> Array:
    """A sprite of one colour from an alpha mask `[h, w]`."""
    sprite = np.empty((*mask.shape, 4), dtype=np.uint8)
    sprite[..., :3] = colour
    sprite[..., 3] = mask
    return sprite


def resized(sprite: Array, size: int, angle: float = 0.0, flip: bool = False) -> Array:
    """Scale a square sprite or mask, after turning it by `angle` degrees."""
    picture = Image.fromarray(sprite)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        picture = picture.rotate(angle, resample=Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square."""
    if shape == "triangle":
        return [(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]
    if shape == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    if shape == "star":
        points = []
        for corner in range(10):
            radius = 0.52 if corner % 2 == 0 else 0.21
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((0.5 + radius * math.cos(angle), 0.52 + radius * math.sin(angle)))
        return points
    a, b = 0.34, 0.66  # a cross
    upper = [(a, 0.0), (b, 0.0), (b, a), (1.0, a), (1.0, b), (b, b)]
    return upper + [(1 - x, 1 - y) for x, y in upper]


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int) -> Array:
    """Alpha mask `[size, size]` of a shape."""
    big = size * 4
    picture = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(picture)
    if shape in ("circle", "ring"):
        draw.ellipse((big * 0.03, big * 0.03, big * 0.97, big * 0.97), fill=255)
        if shape == "ring":
            draw.ellipse((big * 0.28, big * 0.28, big * 0.72, big * 0.72), fill=0)
    elif shape == "heart":
        draw.ellipse((0, big * 0.05, big * 0.52, big * 0.57), fill=255)
        draw.ellipse((big * 0.48, big * 0.05, big - 1, big * 0.57), fill=255)
        point = [(big * 0.04, big * 0.42), (big * 0.96, big * 0.42), (big / 2, big * 0.98)]
        draw.polygon(point, fill=255)
    else:
        draw.polygon([(x * big, y * big) for x, y in _polygon(shape)], fill=255)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


@lru_cache(maxsize=4096)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=8192)
def text_mask(text: str, path: str, size: int) -> Array:
    """Tight alpha mask of a line of text."""
    face = font(path, size)
    left, top, right, bottom = face.getbbox(text)
    picture = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))), 0)
    ImageDraw.Draw(picture).text((-left, -top), text, font=face, fill=255)
    return np.asarray(picture)


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
