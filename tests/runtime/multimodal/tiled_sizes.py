"""Random picture sizes for the families that cut pictures into tiles, and random pictures."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

EXTREMES = [(1, 1), (1, 2000), (2000, 1), (4000, 3000), (2999, 17), (384, 384), (448, 448)]
"""Width and height."""


def random_sizes(count: int, seed: int, longest: int = 4000) -> list[tuple[int, int]]:
    """Draw sizes from 1x1 to `longest`, small and narrow ones often."""
    rng = random.Random(seed)

    def side(limit: int) -> int:
        return round(limit ** rng.random())

    sizes = []
    for _ in range(count):
        limits = rng.choice([(longest, longest), (60, longest), (longest, 60), (700, 700)])
        sizes.append((side(limits[0]), side(limits[1])))
    return sizes


def random_picture(width: int, height: int, seed: int) -> Image.Image:
    """Return noise upon a slope, so that resizing and the place of every tile show."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 96, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] += np.linspace(0, 159, width, dtype=np.uint8)
    pixels[..., 1] += np.linspace(0, 159, height, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def patches_of(tiles: np.ndarray, patch_size: int = 14) -> np.ndarray:
    """Cut transformers' tiles `[tiles, 3, side, side]` as a strided convolution sees them."""
    p, n = patch_size, tiles.shape[-1] // patch_size
    cut = tiles[:, :, : n * p, : n * p].reshape(-1, 3, n, p, n, p)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * p * p)
