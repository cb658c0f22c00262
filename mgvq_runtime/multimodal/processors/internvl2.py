"""InternVL2's pictures: stretched to the best grid of square tiles, a thumbnail last (for `chat`).

The result is bit for bit that of transformers' `GotOcr2ImageProcessorPil`, which its InternVL uses.
Every picture of a conversation may take all tiles; a frame of a video is one tile. Not here:
decoding, and the lines "Frame1: " that stand before the frames of a video (`multimodal.chat`).

Source: OpenGVLab/InternVL `dynamic_preprocess`; transformers 5.24
`models/got_ocr2/image_processing_pil_got_ocr2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.multimodal.image import to_rgb
from mgvq_runtime.multimodal.processors.base import (
    ImageProcessor,
    PictureFiles,
    PixelRule,
    cut_tiles,
)
from mgvq_runtime.request import ImageInput

IMAGENET = PixelRule((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MAX_TILES = 1000
"""More than any model was trained with; bounds the number of grids that are tried."""


@lru_cache(maxsize=32)
def tile_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return the grids (columns, rows) with that many tiles, fewest tiles first."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def select_grid(
    height: int, width: int, tile_size: int, min_tiles: int, max_tiles: int
) -> tuple[int, int]:
    """Choose the grid whose shape is nearest to the picture's; a larger one if it fills half of it.

    Returns:
        Columns and rows of tiles.
    """
    ratio, area = width / height, width * height
    best, least = (1, 1), math.inf
    for columns, rows in tile_grids(min_tiles, max_tiles):
        difference = abs(ratio - columns / rows)
        is_filled = area > 0.5 * tile_size**2 * columns * rows
        if difference < least or (difference == least and is_filled):
            best, least = (columns, rows), difference
    return best


@dataclass(frozen=True)
class InternVL2ImageProcessor(ImageProcessor):
    """Cuts pictures into tiles; call it with a PIL image."""

    tile_size: int = 448
    """Side of a tile in pixels."""
    patch_size: int = 14
    merge_size: int = 2
    """Side of the square of patches that becomes one token."""
    min_tiles: int = 1
    max_tiles: int = 12
    """Most tiles of one picture, the thumbnail not counted."""
    has_thumbnail: bool = True
    """Whether a picture of several tiles is followed by the whole of it as one tile."""
    pixels: PixelRule = IMAGENET
    video_pixels: PixelRule = IMAGENET

    @classmethod
    def read(cls, files: PictureFiles) -> InternVL2ImageProcessor:
        """Read config.json, and the image processor's file where there is one.

        How pictures are cut stands in the hub's config.json, or in transformers' file.

        Raises:
            ConfigError: if a value cannot be honoured.
        """
        top, vision, fields = files.config, files.vision, files.images
        is_hub = top.has("llm_config")
        rules, word = (top, "dynamic_patch") if is_hub else (fields, "patches")
        tile_size = vision.square("image_size", default=448)
        _check_sizes(top if is_hub else fields, tile_size)
        max_tiles = rules.integer(f"max_{word}", default=12)
        if max_tiles > MAX_TILES:
            rules.refuse(f"max_{word}", max_tiles, f"at most {MAX_TILES}")
        # transformers' processor always cuts; what its image processor's file says is overridden.
        is_cut = top.boolean("dynamic_image_size", default=True) if is_hub else True
        return cls(
            tile_size=tile_size,
            patch_size=vision.square("patch_size", default=14),
            merge_size=round(1 / top.number("downsample_ratio", default=0.5)),
            min_tiles=rules.integer(f"min_{word}", default=1) if is_cut else 1,
            max_tiles=max_tiles if is_cut else 1,
            has_thumbnail=top.boolean("use_thumbnail", default=False) if is_hub else True,
            pixels=PixelRule.from_fields(fields, IMAGENET),
            video_pixels=PixelRule.from_fields(files.videos, IMAGENET),
        )

    def capped(self, max_image_tokens: int) -> InternVL2ImageProcessor:
        """Return a processor whose pictures take at most so many tokens.

        Raises:
            ConfigError: if not even a single tile fits.
        """
        tiles = max_image_tokens // self.tile_tokens
        if tiles < 1:
            raise ConfigError(
                f"max_image_tokens must be at least {self.tile_tokens}, the tokens of one tile of "
                f"InternVL2, got {max_image_tokens}"
            )
        most = max(1, tiles - self.has_thumbnail)
        return replace(
            self, min_tiles=min(self.min_tiles, most), max_tiles=min(self.max_tiles, most)
        )

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile."""
        return (self.tile_size // self.patch_size // self.merge_size) ** 2

    @property
    def max_num_tokens(self) -> int:
        """Most tokens any picture can take (for memory planning)."""
        return self.tile_tokens * (self.max_tiles + (self.has_thumbnail and self.max_tiles > 1))

    @property
    def max_grid(self) -> tuple[int, int, int]:
        """Grid of the picture that has most tiles (for memory planning)."""
        side = self.tile_size // self.patch_size
        return self.max_num_tokens // self.tile_tokens, side, side

    def max_video_grid(self, num_tokens: int) -> None:
        """Return None: a frame is a picture."""

    def __call__(self, image: Image.Image, is_alone: bool = True) -> ImageInput:
        """Cut a picture into tiles, as many as its shape asks for.

        Args:
            image: Of any mode; converted to RGB as `multimodal.image` does.
            is_alone: Changes nothing here.
        """
        picture, s = to_rgb(image), self.tile_size
        limits = (self.min_tiles, self.max_tiles)
        columns, rows = select_grid(picture.height, picture.width, s, *limits)
        pixels = self.pixels.resized(picture, rows * s, columns * s)
        tiles = pixels.reshape(rows, s, columns, s, 3).transpose(0, 2, 1, 3, 4)
        tiles = tiles.reshape(-1, s, s, 3)  # [tiles, s, s, 3]
        if self.has_thumbnail and len(tiles) > 1:
            tiles = np.concatenate((tiles, self.pixels.resized(picture, s, s)[None]))
        return self._input(tiles, self.pixels)

    def video(self, frames: Sequence[Image.Image]) -> tuple[ImageInput, ...]:
        """Make one tile, and one input, of each frame of a video."""
        s, rule = self.tile_size, self.video_pixels
        tiles = [rule.resized(to_rgb(frame), s, s) for frame in frames]  # each [s, s, 3]
        return tuple(self._input(tile[None], rule) for tile in tiles)

    def _input(self, tiles: npt.NDArray[np.uint8], rule: PixelRule) -> ImageInput:
        side = self.tile_size // self.patch_size
        return ImageInput(
            cut_tiles(tiles, self.patch_size, rule.table()),
            (len(tiles), side, side),
            len(tiles) * self.tile_tokens,
        )


def _check_sizes(fields: Fields, tile_size: int) -> None:
    """Refuse tiles of another size than the vision tower's."""
    wanted = f"{tile_size}, the vision tower's image_size"
    if fields.integer("force_image_size", default=tile_size) != tile_size:
        fields.refuse("force_image_size", fields.values["force_image_size"], wanted)
    size = Fields(fields.mapping("size", default={}), "size.", fields.file)
    for key in ("height", "width"):
        if size.integer(key, default=tile_size) != tile_size:
            size.refuse(key, size.values[key], wanted)
