"""Which pictures are drawn at which size (called by `conversations`, `scoring`, `build_sets`).

`MIX` is the one place the shares of sizes and of picture types are written. Pictures sometimes are
drawn at another size and scaled down as the image processor does with a user's picture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
from PIL import Image

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.charts import bar_chart
from benchmarks.tiny_vlm.pictures import Picture
from benchmarks.tiny_vlm.scenes import grid_scene
from benchmarks.tiny_vlm.signs import handwritten_number, word_sign
from benchmarks.tiny_vlm.singles import easy_vqa, single_animal, single_emoji, single_flag

Drawer = Callable[[Random, Assets, int, int], Picture]

DRAWERS: dict[str, Drawer] = {
    "shapes": partial(grid_scene, family="shape"),
    "emojis": partial(grid_scene, family="emoji"),
    "animals": partial(grid_scene, family="animal"),
    "emoji": single_emoji,
    "animal": single_animal,
    "flag": single_flag,
    "easy_vqa": easy_vqa,
    "word": word_sign,
    "number": handwritten_number,
    "chart": bar_chart,
}

Mix = dict[str, float]
SQUARE: Mix = {
    "shapes": 43,
    "emojis": 4,
    "animals": 3,
    "emoji": 9,
    "animal": 4,
    "flag": 3,
    "easy_vqa": 2,
    "word": 5,
    "number": 12,
    "chart": 15,
}
SMALL: Mix = {"shapes": 30, "emoji": 20, "animal": 12, "flag": 14, "number": 24}
STRIP: Mix = {"word": 55, "number": 45}
WIDE: Mix = {"shapes": 44, "emojis": 4, "word": 12, "number": 8, "chart": 32}

MIX: dict[tuple[int, int], tuple[float, Mix]] = {
    (112, 112): (60, SQUARE),
    (84, 84): (10, SMALL),
    (56, 84): (2, {"number": 70, "word": 30}),
    (56, 112): (5, STRIP),
    (56, 168): (3, STRIP),
    (84, 168): (2, STRIP),
    (140, 140): (4, SQUARE),
    (168, 168): (5, SQUARE),
    (112, 168): (4, WIDE),
    (112, 224): (2, WIDE),
    (168, 112): (1, SQUARE),
    (196, 196): (1, SQUARE),
    (224, 224): (1, SQUARE),
}
"""Size (height, width) to its share of micro-batches and the types drawn at it."""


def choose_size(rng: Random) -> tuple[int, int]:
    """A size for one micro-batch."""
    sizes = list(MIX)
    return rng.choices(sizes, [MIX[size][0] for size in sizes])[0]


def choose_type(rng: Random, size: tuple[int, int]) -> str:
    """A picture type for a size."""
    mix = MIX[size][1]
    return rng.choices(list(mix), list(mix.values()))[0]


def draw(rng: Random, assets: Assets, kind: str, size: tuple[int, int]) -> Picture:
    """Draw one picture of `size`, one in eight from a larger original."""
    height, width = size
    if rng.random() < 0.125 and kind != "easy_vqa":
        scale = rng.uniform(1.05, 1.3 if kind in ("word", "chart") else 2.0)
        skew = rng.uniform(0.93, 1.07)
        original = (round(height * scale), round(width * scale * skew))
        picture = DRAWERS[kind](rng, assets, *original)
        smaller = Image.fromarray(picture.pixels).resize((width, height), Image.Resampling.BICUBIC)
        picture.pixels = np.asarray(smaller)
        sx, sy = width / original[1], height / original[0]
        picture.boxes = [
            box._replace(
                left=box.left * sx, right=box.right * sx, top=box.top * sy, bottom=box.bottom * sy
            )
            for box in picture.boxes
        ]
        return picture
    return DRAWERS[kind](rng, assets, height, width)
