"""LLaVA-OneVision's pictures: anyres tiles of one picture, whole pictures of several (for `chat`).

The result is bit for bit that of transformers' `LlavaOnevisionImageProcessorPil`, and the number of
tokens that of its processor. A frame of a video is one tile, whatever its shape.

Source: transformers 5.24 `models/llava_onevision/`: `image_processing_pil_llava_onevision.py` and
`processing_llava_onevision.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    check_steps,
    cut_tiles,
    reduced,
)
from mgvq_runtime.request import FrameLayout, ImageInput, TileLayout

HALF = PixelRule((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAX_TILES_A_SIDE = 64
MAX_SQUARE_SIDE = 8192
"""Pixels a side of the largest square a picture is padded to: 268 MB in Pillow, little more than
the largest picture that is let in takes itself. A line of a million pixels would take 4 TB."""
SHRINK_ABOVE = 1.1
"""Features are interpolated where their side is more than this times the largest allowed."""

Size = tuple[int, int]
"""Height and width."""


def default_pinpoints(tile_size: int) -> tuple[Size, ...]:
    """Return the 36 canvases of up to 6 x 6 tiles."""
    sides = [tile_size * n for n in range(1, 7)]
    return tuple((height, width) for height in sides for width in sides)


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Choose the canvas that keeps most of a picture's pixels, then the one that wastes least."""
    height, width = size
    best, most_kept, least_wasted = pinpoints[0], 0, math.inf
    for canvas_height, canvas_width in pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_height * canvas_width - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (canvas_height, canvas_width), kept, wasted
    return best


def unpadded(size: Size, grid: Size) -> Size:
    """Return the rows and columns of a canvas that hold the picture, not its padding.

    Args:
        size: Of the picture, in pixels.
        grid: Rows and columns of patches on the canvas.
    """
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        used = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - used) // 2), columns
    used = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - used) // 2)


@dataclass(frozen=True)
class LlavaOnevisionImageProcessor(ImageProcessor):
    """Cuts pictures into tiles; call it with each of a conversation."""

    pinpoints: tuple[Size, ...]
    """Canvases a picture may be fitted into; none, where each picture is one tile."""
    tile_size: int = 384
    """Side of a tile in pixels."""
    patch_size: int = 14
    max_tiles: int | None = 9
    """Features of more tiles than this are interpolated down; None never does."""
    pixels: PixelRule = HALF
    video_pixels: PixelRule = HALF

    @classmethod
    def read(cls, files: PictureFiles) -> LlavaOnevisionImageProcessor:
        """Read config.json, and preprocessor_config.json or processor_config.json over it.

        lmms-lab's folders have config.json alone.

        Raises:
            ConfigError: if a value cannot be honoured.
        """
        top, vision, fields = files.config, files.vision, files.images
        tile_size = vision.square("image_size", default=384)
        check_steps(fields, ("do_pad",))
        size = Fields(fields.mapping("size", default={}), "size.", fields.file)
        for key in ("height", "width", "shortest_edge"):
            if size.integer(key, default=tile_size) != tile_size:
                size.refuse(key, size.values[key], f"{tile_size}, the vision tower's image_size")
        holder = fields if fields.has("image_grid_pinpoints") else top
        return cls(
            pinpoints=_pinpoints(holder, tile_size),
            tile_size=tile_size,
            patch_size=vision.square("patch_size", default=14),
            max_tiles=_max_tiles(top),
            pixels=PixelRule.from_fields(fields, HALF),
            video_pixels=PixelRule.from_fields(files.videos, HALF),
        )

    def capped(self, max_image_tokens: int) -> LlavaOnevisionImageProcessor:
        """Return a processor whose pictures take at most so many tokens.

        Raises:
            ConfigError: if not even a single tile fits.
        """
        least = self.side**2 + 1
        if max_image_tokens < least:
            raise ConfigError(
                f"max_image_tokens must be at least {least}, the tokens of one tile of "
                f"LLaVA-OneVision, got {max_image_tokens}"
            )
        kept = [p for p in self.pinpoints if self._most_tokens(p) <= max_image_tokens]
        return replace(self, pinpoints=tuple(kept))

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def max_num_tokens(self) -> int:
        """Most tokens any picture can take (for memory planning)."""
        return max([self._most_tokens(p) for p in self.pinpoints], default=self.side**2 + 1)

    @property
    def max_grid(self) -> tuple[int, int, int]:
        """Grid of the picture that has most tiles (for memory planning)."""
        tiles = [height * width // self.tile_size**2 for height, width in self.pinpoints]
        return 1 + max(tiles, default=0), self.side, self.side

    def max_video_grid(self, num_tokens: int) -> tuple[int, int, int]:
        """Return the grid of as many frames as have so many tokens, one at least."""
        frame = (-(-self.side // 2)) ** 2
        return max(1, (num_tokens - 1) // frame), self.side, self.side

    def layout_of(self, height: int, width: int) -> TileLayout | None:
        """Return how a single picture of this size is cut; None where it is one tile."""
        if not self.pinpoints:
            return None
        canvas = select_best_resolution((height, width), self.pinpoints)
        rows, columns = (length // self.tile_size for length in canvas)
        kept = unpadded((height, width), (rows * self.side, columns * self.side))
        return TileLayout(rows, columns, kept, self._shrunk(kept))

    def __call__(self, image: Image.Image, is_alone: bool = True) -> ImageInput:
        """Cut a picture that is alone in its conversation into tiles; one of several stays whole.

        Args:
            image: Of any mode; converted to RGB as `multimodal.image` does.
            is_alone: Whether the conversation has no other picture; videos are none.
        """
        picture = to_rgb(image)
        layout = self.layout_of(picture.height, picture.width) if is_alone else None
        return self._whole(picture) if layout is None else self._tiled(picture, layout)

    def video(self, frames: Sequence[Image.Image]) -> tuple[ImageInput, ...]:
        """Make one tile of each frame; the model halves each side of their features."""
        s, rule = self.tile_size, self.video_pixels
        tiles = np.stack([rule.resized(to_rgb(frame), s, s) for frame in frames])  # [F, s, s, 3]
        layout = FrameLayout(side=-(-self.side // 2))
        num_tokens = len(tiles) * layout.side**2 + 1
        patches = cut_tiles(tiles, self.patch_size, rule.table())
        grid = (len(tiles), self.side, self.side)
        return (ImageInput(patches, grid, num_tokens, layout, is_video=True),)

    def _tiled(self, picture: Image.Image, layout: TileLayout) -> ImageInput:
        """Cut one picture into the whole and its tiles."""
        canvas = (layout.rows * self.tile_size, layout.columns * self.tile_size)
        scale_height, scale_width = canvas[0] / picture.height, canvas[1] / picture.width
        height, width = canvas
        if scale_width < scale_height:
            height = min(math.ceil(picture.height * scale_width), canvas[0])
        else:
            width = min(math.ceil(picture.width * scale_height), canvas[1])
        pixels = np.zeros((*canvas, 3), np.uint8)
        top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
        pixels[top : top + height, left : left + width] = self.pixels.resized(
            picture, height, width
        )
        s = self.tile_size
        tiles = pixels.reshape(layout.rows, s, layout.columns, s, 3).transpose(0, 2, 1, 3, 4)
        whole = self.pixels.resized(picture, s, s)[None]  # [1, s, s, 3]
        tiles = np.concatenate((whole, tiles.reshape(-1, s, s, 3)))
        height, width = layout.shrunk
        return self._input(tiles, self.side**2 + height * (width + 1), layout)

    def _whole(self, picture: Image.Image) -> ImageInput:
        """Pad one of several pictures to a square and make it one tile.

        One too long for a square is made smaller before as well; in transformers only afterwards.
        """
        picture = reduced(picture, MAX_SQUARE_SIDE)
        longest = max(picture.size)
        colour = tuple(int(mean * 255) for mean in self.pixels.mean)
        square = Image.new("RGB", (longest, longest), colour)
        place = ((longest - picture.width) // 2, (longest - picture.height) // 2)
        square.paste(picture, place)
        tile = self.pixels.resized(square, self.tile_size, self.tile_size)
        return self._input(tile[None], self.side**2 + 1, None)

    def _input(
        self, tiles: npt.NDArray[np.uint8], num_tokens: int, layout: TileLayout | None
    ) -> ImageInput:
        patches = cut_tiles(tiles, self.patch_size, self.pixels.table())
        return ImageInput(patches, (len(tiles), self.side, self.side), num_tokens, layout)

    def _shrunk(self, kept: Size) -> Size:
        """Return the size features are interpolated to, the same where they are few enough."""
        if self.max_tiles is None:
            return kept
        height, width = kept
        ratio = math.sqrt(height * width / (self.max_tiles * self.side**2))
        return kept if ratio <= SHRINK_ABOVE else (int(height // ratio), int(width // ratio))

    def _most_tokens(self, pinpoint: Size) -> int:
        """Return the most tokens a picture on this canvas can take."""
        rows, columns = (length // self.tile_size * self.side for length in pinpoint)
        most = rows * (columns + 1)
        if self.max_tiles is not None:
            # Below the ratio nothing shrinks: up to 1.1**2 times the area, in as many lines as fit.
            area = self.max_tiles * self.side**2 * SHRINK_ABOVE**2
            most = min(most, math.floor(area) + rows)
        return self.side**2 + most


def _pinpoints(fields: Fields, tile_size: int) -> tuple[Size, ...]:
    """Read canvases: a list of sizes, or lmms-lab's "(1x1),...,(6x6)": first and last, in tiles."""
    key = "image_grid_pinpoints"
    value = fields.values.get(key)
    if value is None:
        return default_pinpoints(tile_size)
    if isinstance(value, str):
        pairs = [[int(n) for n in pair] for pair in re.findall(r"\((\d+)x(\d+)\)", value)]
        if len(pairs) < 2 or max(pairs[-1]) > MAX_TILES_A_SIDE:
            fields.refuse(key, value, 'a list of sizes, or "(1x1),...,(6x6)"')
        (low, left), (high, right) = pairs[0], pairs[-1]
        value = [
            [rows * tile_size, columns * tile_size]
            for rows in range(low, high + 1)
            for columns in range(left, right + 1)
        ]
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(
        isinstance(p, list)
        and len(p) == 2
        and all(type(n) is int and n > 0 and n % tile_size == 0 for n in p)
        for p in value
    ):
        fields.refuse(key, value, f"sizes [height, width] in multiples of {tile_size}")
    return tuple((height, width) for height, width in value)


def _max_tiles(top: Fields) -> int | None:
    """Read how many tiles' features are kept: the number of "anyres_max_9"."""
    key = "vision_aspect_ratio" if top.has("vision_aspect_ratio") else "image_aspect_ratio"
    value = top.values.get(key) or "anyres_max_9"
    match = re.fullmatch(r"anyres(?:_max_([1-9]\d{0,3}))?", str(value))
    if match is None:
        top.refuse(key, value, "'anyres' or 'anyres_max_9'")
    return int(match[1]) if match[1] else None
