"""Qwen2-VL's pictures: resize to a multiple of 28, cut into 14x14 patches (called by `chat`).

The result is bit for bit that of transformers' `Qwen2VLImageProcessorPil`: the same rounding, the
same PIL bicubic, the same float32 values, the same patch order. Not here: decoding, videos.

Source: transformers 5.23 `models/qwen2_vl/image_processing_pil_qwen2_vl.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgvq_runtime.errors import ConfigError, ImageError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.multimodal.image import to_rgb
from mgvq_runtime.multimodal.processors.base import (
    check_steps,
    pixel_table,
    read_normalisation,
    read_resample,
    required_fields,
)
from mgvq_runtime.request import ImageInput

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Choose the size a picture is resized to: multiples of `factor`, area within the limits.

    A very narrow picture may end above `max_pixels`, as in transformers: no side is below `factor`.

    Args:
        height: Pixels.
        width: Pixels.
        factor: Pixels along one side of one merged patch.
        min_pixels: Least area.
        max_pixels: Most area.

    Returns:
        Height and width.

    Raises:
        ImageError: if one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"the picture is {width} x {height}: one side may be at most {MAX_ASPECT_RATIO} times "
            "the other"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class Qwen2VLImageProcessor:
    """Cuts pictures into patches; call it with a PIL image."""

    min_pixels: int = DEFAULT_MIN_PIXELS
    """Least area after resizing."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Most area after resizing."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    """Patches along each side of one merged patch, which is one token."""
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    @classmethod
    def from_folder(
        cls, path: str | Path, max_image_tokens: int | None = None
    ) -> Qwen2VLImageProcessor:
        """Read preprocessor_config.json (hub) or processor_config.json (transformers 5).

        Args:
            path: A checkpoint folder.
            max_image_tokens: Caps the area a picture is resized to, at this many tokens.

        Raises:
            ConfigError: if neither file is there, or a value in it cannot be honoured.
        """
        fields = required_fields(Path(path))
        check_steps(fields, ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"))
        size = Fields(fields.mapping("size", default={}), "size.", fields.file)
        shortest = size.integer("shortest_edge", default=DEFAULT_MIN_PIXELS)
        longest = size.integer("longest_edge", default=DEFAULT_MAX_PIXELS)
        processor = cls(
            min_pixels=fields.integer("min_pixels", default=shortest),
            max_pixels=fields.integer("max_pixels", default=longest),
            patch_size=fields.square("patch_size", default=14),
            temporal_patch_size=fields.square("temporal_patch_size", default=2),
            merge_size=fields.integer("merge_size", default=2),
            resample=read_resample(fields),
            **read_normalisation(fields, CLIP_MEAN, CLIP_STD),
        )
        return processor if max_image_tokens is None else processor.capped(max_image_tokens)

    def capped(self, max_image_tokens: int) -> Qwen2VLImageProcessor:
        """Return a processor whose pictures are resized to at most so many tokens.

        Raises:
            ConfigError: if the cap is below one token.
        """
        if max_image_tokens < 1:
            raise ConfigError(f"max_image_tokens must be at least 1, got {max_image_tokens}")
        max_pixels = min(self.max_pixels, max_image_tokens * self.factor**2)
        values = {**self.__dict__, "max_pixels": max_pixels}
        values["min_pixels"] = min(self.min_pixels, max_pixels)
        return type(self)(**values)

    @property
    def factor(self) -> int:
        """Pixels along one side of one token."""
        return self.patch_size * self.merge_size

    @property
    def max_num_tokens(self) -> int:
        """Most tokens any picture can take, the narrowest included (for memory planning)."""
        most, least = self.max_pixels / self.factor**2, self.min_pixels / self.factor**2
        narrowest = math.sqrt(MAX_ASPECT_RATIO)
        # Shrinking keeps each side at one token or more; growing rounds both sides up.
        shrunk = most if most >= MAX_ASPECT_RATIO else math.sqrt(most) * narrowest
        grown = least + math.sqrt(least) * (narrowest + 1 / narrowest) + 1
        return math.floor(max(most, shrunk, grown))

    @property
    def max_grid(self) -> tuple[int, int, int]:
        """Grid of a picture with most tokens (for memory planning)."""
        return 1, self.merge_size, self.merge_size * self.max_num_tokens

    def grid_of(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the patches along time, height and width of a picture of this size.

        Raises:
            ImageError: if one side is more than 200 times the other.
        """
        size = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return 1, size[0] // self.patch_size, size[1] // self.patch_size

    def __call__(self, image: Image.Image, is_alone: bool = True) -> ImageInput:
        """Resize, normalise and cut a picture.

        Args:
            image: Any mode; converted to RGB as `multimodal.image` does.
            is_alone: Changes nothing here.

        Returns:
            Patches `[h * w, 3 * temporal * patch * patch]` float32 in merge order, the grid, and
            the number of tokens.

        Raises:
            ImageError: if one side is more than 200 times the other.
        """
        image = to_rgb(image)
        t, rows, columns = self.grid_of(image.height, image.width)
        size = (columns * self.patch_size, rows * self.patch_size)
        if size != image.size:
            image = image.resize(size, Image.Resampling(self.resample))
        pixels = np.asarray(image)  # [rows * patch, columns * patch, 3] uint8
        patches = self._cut(pixels, rows, columns)
        return ImageInput(patches, (t, rows, columns), rows * columns // self.merge_size**2)

    def _cut(
        self, pixels: npt.NDArray[np.uint8], rows: int, columns: int
    ) -> npt.NDArray[np.float32]:
        """Cut uint8 pixels into normalised patches `[rows * columns, 3 * T * p * p]` float32."""
        m, p = self.merge_size, self.patch_size
        blocks = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/m, columns/m, m, m, 3, p, p]
        codes = blocks.reshape(rows * columns, 3, 1, p * p)  # [P, 3, 1, p * p] uint8
        table = pixel_table(self.image_mean, self.image_std, self.rescale_factor)
        patches = np.empty((rows * columns, 3, self.temporal_patch_size, p * p), np.float32)
        for channel in range(3):  # a still picture fills every frame of its temporal patch
            patches[:, channel] = table[channel][codes[:, channel]]
        return patches.reshape(rows * columns, -1)
