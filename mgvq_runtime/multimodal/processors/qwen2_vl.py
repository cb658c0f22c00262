"""Qwen2-VL's pictures: resize to a multiple of 28, cut into 14x14 patches (called by `chat`).

The result is bit for bit that of transformers' `Qwen2VLImageProcessorPil`: the same rounding, the
same PIL bicubic, the same float32 values, the same patch order. Two frames of a video are one patch
deep; a picture is a video of two equal frames. Not here: decoding, the choice of frames.

Source: transformers 5.24 `models/qwen2_vl/image_processing_pil_qwen2_vl.py` and
`video_processing_qwen2_vl.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgvq_runtime.errors import ConfigError, ImageError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.multimodal.image import to_rgb
from mgvq_runtime.multimodal.processors.base import (
    CONFIG_NAMES,
    ImageProcessor,
    PictureFiles,
    PixelRule,
)
from mgvq_runtime.request import ImageInput

MAX_ASPECT_RATIO = 200
CLIP = PixelRule((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MAX_AREA = 2**40
"""Any limit above the largest picture is none."""
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
class Qwen2VLImageProcessor(ImageProcessor):
    """Cuts pictures and videos into patches; call it with a PIL image."""

    min_pixels: int = DEFAULT_MIN_PIXELS
    """Least area after resizing."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Most area after resizing: of a picture, and of all temporal patches of a video together."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    """Frames in one patch."""
    merge_size: int = 2
    """Patches along each side of one merged patch, which is one token."""
    frame_min_pixels: int = DEFAULT_MIN_PIXELS
    """Least area of a frame of a video, which comes before the most of all together."""
    frame_max_pixels: int = DEFAULT_MAX_PIXELS
    """Most area of a frame of a video."""
    pixels: PixelRule = CLIP
    video_pixels: PixelRule = CLIP

    @classmethod
    def read(cls, files: PictureFiles) -> Qwen2VLImageProcessor:
        """Read preprocessor_config.json (hub) or processor_config.json (transformers 5).

        Raises:
            ConfigError: if neither file is there, or a value in it cannot be honoured or is not
                the vision tower's.
        """
        fields, videos = files.images, files.videos
        if not fields.values:
            raise ConfigError(
                f"{files.folder} has neither {' nor '.join(CONFIG_NAMES)} with an image processor: "
                "how pictures are prepared is part of a checkpoint"
            )
        if files.has_config:
            for each in (fields, videos):
                _check_patches(each, files.vision)
        min_pixels, max_pixels = _areas(fields)
        frame_min_pixels, frame_max_pixels = _areas(videos)
        return cls(
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            patch_size=fields.square("patch_size", default=14),
            temporal_patch_size=fields.square("temporal_patch_size", default=2),
            merge_size=fields.integer("merge_size", default=2),
            frame_min_pixels=frame_min_pixels,
            frame_max_pixels=frame_max_pixels,
            pixels=PixelRule.from_fields(fields, CLIP),
            video_pixels=PixelRule.from_fields(videos, CLIP),
        )

    def capped(self, max_image_tokens: int) -> Qwen2VLImageProcessor:
        """Return a processor whose pictures are resized to at most so many tokens.

        A video is resized so too, but no frame below its own least area: a long one takes more.

        Raises:
            ConfigError: if the cap is below one token.
        """
        if max_image_tokens < 1:
            raise ConfigError(f"max_image_tokens must be at least 1, got {max_image_tokens}")
        most = min(self.max_pixels, max_image_tokens * self.factor**2)
        return replace(
            self,
            min_pixels=min(self.min_pixels, most),
            max_pixels=most,
            frame_min_pixels=min(self.frame_min_pixels, most),
        )

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

    def max_video_grid(self, num_tokens: int) -> tuple[int, int, int]:
        """Return the grid of as many of the least frames as have so many tokens, one at least."""
        frame = max(1, min(num_tokens, self.frame_min_pixels // self.factor**2))
        return max(1, num_tokens // frame), self.merge_size, self.merge_size * frame

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
        _, rows, columns = self.grid_of(image.height, image.width)
        size = (rows * self.patch_size, columns * self.patch_size)
        frames = self.pixels.resized(image, *size)[None]  # [1, height, width, 3] uint8
        return self._input(frames, (1, rows, columns), self.pixels)

    def video(self, frames: Sequence[Image.Image]) -> tuple[ImageInput, ...]:
        """Resize all frames alike and cut them; the last is repeated to fill its patch.

        Raises:
            ImageError: if they are of different sizes, or one side is more than 200 times the
                other.
        """
        if len({frame.size for frame in frames}) > 1:
            sizes = ", ".join(sorted({f"{frame.width} x {frame.height}" for frame in frames}))
            raise ImageError(f"the frames of a video must be of one size, got {sizes[:200]}")
        t = -(-len(frames) // self.temporal_patch_size)
        # As transformers shares a video's area out among its frames, with `cap_pixels_per_frame`.
        least, share = self.frame_min_pixels, min(self.frame_max_pixels, self.max_pixels // t)
        areas = (least, max(share, int(1.05 * least)))
        size = smart_resize(frames[0].height, frames[0].width, self.factor, *areas)
        pixels = [self.video_pixels.resized(to_rgb(frame), *size) for frame in frames]
        pixels += [pixels[-1]] * (t * self.temporal_patch_size - len(pixels))
        grid = (t, size[0] // self.patch_size, size[1] // self.patch_size)
        return (self._input(np.stack(pixels), grid, self.video_pixels, is_video=True),)

    def _input(
        self,
        frames: npt.NDArray[np.uint8],
        grid: tuple[int, int, int],
        rule: PixelRule,
        is_video: bool = False,
    ) -> ImageInput:
        """Cut `frames [F, height, width, 3]`; a single one fills every layer of its patches."""
        (t, rows, columns), m, p = grid, self.merge_size, self.patch_size
        blocks = frames.reshape(t, -1, rows // m, m, p, columns // m, m, p, 3)
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [t, rows/m, columns/m, m, m, 3, ...]
        num_patches = t * rows * columns
        codes = blocks.reshape(num_patches, 3, -1, p * p)  # [P, 3, 1 or temporal, p * p] uint8
        table = rule.table()
        patches = np.empty((num_patches, 3, self.temporal_patch_size, p * p), np.float32)
        for channel in range(3):
            patches[:, channel] = table[channel][codes[:, channel]]
        flat = patches.reshape(num_patches, -1)
        return ImageInput(flat, grid, num_patches // m**2, is_video=is_video)


def _check_patches(fields: Fields, vision: Fields) -> None:
    """Refuse patches of another form than the vision tower takes."""
    for key, tower_key, default in (
        ("patch_size", "patch_size", 14),
        ("temporal_patch_size", "temporal_patch_size", 2),
        ("merge_size", "spatial_merge_size", 2),
    ):
        wanted = vision.square(tower_key, default=default)
        if (found := fields.square(key, default=default)) != wanted:
            fields.refuse(key, found, f"{wanted}, {vision.prefix}{tower_key} of {vision.file}")


def _areas(fields: Fields) -> tuple[int, int]:
    """Read the least and the most area, in the spelling of either file."""
    size = Fields(fields.mapping("size", default={}), "size.", fields.file)
    least = size.integer("shortest_edge", default=DEFAULT_MIN_PIXELS, high=MAX_AREA)
    most = size.integer("longest_edge", default=DEFAULT_MAX_PIXELS, high=MAX_AREA)
    return (
        fields.integer("min_pixels", default=least, high=MAX_AREA),
        fields.integer("max_pixels", default=most, high=MAX_AREA),
    )
