"""What every image processor does, and what they share (extended by those of the families).

Normalised pixel values are looked up, 256 a channel, so they are transformers' own float32 to the
last bit. Where to cut, and how many tokens come of it, is each family's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgvq_runtime.checkpoint.files import read_json
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.request import ImageInput

CONFIG_NAMES = ("preprocessor_config.json", "processor_config.json")
VIDEO_CONFIG_NAME = "video_preprocessor_config.json"
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
"""Steps that ours always takes and a file could leave out."""
MAX_RESIZED_SIDE = 2**17
"""Longest side that Pillow resizes at once: it takes 32 bytes for each of its pixels, 1.6 GB for a
line of 50 million of them."""


@dataclass(frozen=True)
class PixelRule:
    """How pixels are resampled and normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)
    """PIL's number of the filter."""

    @classmethod
    def from_fields(cls, fields: Fields, default: PixelRule) -> PixelRule:
        """Read `image_mean`, `image_std`, `rescale_factor` and `resample`.

        Args:
            fields: A processor's values.
            default: What stands for a key that is left out.

        Raises:
            ConfigError: if a value cannot be honoured.
        """
        std = fields.numbers("image_std", 3, default=default.std)
        if min(std) <= 0:
            fields.refuse("image_std", list(std), "three numbers above 0")
        resample = fields.integer("resample", default=default.resample, low=0)
        if resample not in list(Image.Resampling):
            fields.refuse("resample", resample, "a resampling filter of PIL, 0 to 5")
        mean = fields.numbers("image_mean", 3, default=default.mean)
        factor = fields.number("rescale_factor", default.rescale_factor)
        rule = cls(mean, std, factor, resample)
        with np.errstate(all="ignore"):
            is_finite = bool(np.isfinite(rule.table()).all())
        if not is_finite:
            given = f"{factor:g}, with image_mean {list(mean)} and image_std {list(std)}"
            fields.refuse("rescale_factor", given, "one that leaves pixel values finite")
        return rule

    def table(self) -> npt.NDArray[np.float32]:
        """Return `[3, 256]` float32: what each pixel value becomes, in transformers' rounding."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std

    def resized(self, picture: Image.Image, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Return the pixels `[height, width, 3]` of a picture stretched to that size."""
        if picture.size != (width, height):
            picture = reduced(picture, MAX_RESIZED_SIDE)
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        return np.asarray(picture)


@dataclass(frozen=True)
class PictureFiles:
    """What a checkpoint folder says of pictures and videos; each file is read when asked for."""

    folder: Path

    @property
    def has_config(self) -> bool:
        """Whether there is a config.json; a processor that was saved by itself has none."""
        return (self.folder / "config.json").is_file()

    @property
    def config(self) -> Fields:
        """config.json."""
        return Fields(read_json(self.folder / "config.json"), "")

    @property
    def vision(self) -> Fields:
        """`vision_config` of config.json."""
        return Fields(self.config.mapping("vision_config", default={}), "vision_config.")

    @property
    def images(self) -> Fields:
        """The image processor's values; none where the folder has no such file.

        Of two files the nested one goes first, as in transformers 5, which writes it beside an
        older one.
        """
        found = self._find((CONFIG_NAMES[1], "image_processor"), (CONFIG_NAMES[0], None))
        return found or Fields({}, "", CONFIG_NAMES[0])

    @property
    def videos(self) -> Fields:
        """The video processor's values; where there are none, as in older folders, the images'."""
        found = self._find((CONFIG_NAMES[1], "video_processor"), (VIDEO_CONFIG_NAME, None))
        return found or self.images

    def _find(self, *sources: tuple[str, str | None]) -> Fields | None:
        """Return the first of some files, or of a key in one, that is there.

        Raises:
            ConfigError: if a file is damaged or describes something else.
        """
        for name, key in sources:
            file = self.folder / name
            if not file.is_file():
                continue
            try:
                values: Any = read_json(file)
            except CheckpointError as error:
                message = f"{name} does not describe an image processor: {error}"
                raise ConfigError(message) from error
            if key is not None:
                values = {} if values.get(key) is None else values[key]
            if not isinstance(values, dict):
                raise ConfigError(f"{file} does not describe an image processor")
            if values:
                return Fields(values, "", name)
        return None


class ImageProcessor(ABC):
    """Turns the pictures and videos of one family into patches."""

    @classmethod
    def from_folder(cls, path: str | Path, max_image_tokens: int | None = None) -> Self:
        """Read how a checkpoint's pictures are prepared.

        Args:
            path: A checkpoint folder.
            max_image_tokens: Most tokens one picture may take; None leaves it to the checkpoint.

        Raises:
            ConfigError: if the files are missing, or a value in them cannot be honoured.
        """
        files = PictureFiles(Path(path))
        for fields in (files.images, files.videos):
            check_steps(fields, STEPS)
        processor = cls.read(files)
        return processor if max_image_tokens is None else processor.capped(max_image_tokens)

    @classmethod
    @abstractmethod
    def read(cls, files: PictureFiles) -> Self:
        """Read a folder's files; what no family's processor leaves out has been checked.

        Raises:
            ConfigError: if a file that is needed is missing, or a value cannot be honoured.
        """

    @abstractmethod
    def capped(self, max_image_tokens: int) -> Self:
        """Return a processor whose pictures take at most so many tokens.

        Raises:
            ConfigError: if no picture can be that small.
        """

    @property
    @abstractmethod
    def max_num_tokens(self) -> int:
        """Most tokens any picture can take (for memory planning)."""

    @property
    @abstractmethod
    def max_grid(self) -> tuple[int, int, int]:
        """Grid of the picture that has most patches (for memory planning)."""

    @abstractmethod
    def max_video_grid(self, num_tokens: int) -> tuple[int, int, int] | None:
        """Return the grid with most patches of a video of so many tokens (for memory planning).

        None in a family that shows a video as pictures of one tile each.
        """

    @abstractmethod
    def __call__(self, image: Image.Image, is_alone: bool = True) -> ImageInput:
        """Cut a picture into patches.

        Args:
            image: Of any mode; converted to RGB as `multimodal.image` does.
            is_alone: Whether the conversation has no other picture, where that matters.

        Raises:
            ImageError: if it is of a shape the family does not take.
        """

    @abstractmethod
    def video(self, frames: Sequence[Image.Image]) -> tuple[ImageInput, ...]:
        """Cut the frames of a video, one at least, into patches.

        Args:
            frames: As the pictures of `__call__`.

        Returns:
            One input, or one a frame in a family that shows videos so (`ModelConfig.shows_frames`).

        Raises:
            ImageError: if it is of a shape the family does not take.
        """


def reduced(picture: Image.Image, longest: int) -> Image.Image:
    """Return a picture whose sides are at most `longest`: blocks of pixels are averaged."""
    factor = -(-max(picture.size) // longest)
    return picture if factor == 1 else picture.reduce(factor)


def check_steps(fields: Fields, names: Sequence[str]) -> None:
    """Refuse a processor that leaves out one of the steps `names`, which ours always does."""
    for name in names:
        if not fields.boolean(name, default=True):
            fields.refuse(name, False, "true: nothing else is implemented")


def cut_tiles(
    tiles: npt.NDArray[np.uint8], patch_size: int, table: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Cut square tiles into normalised patches.

    Args:
        tiles: `[tiles, side, side, 3]` uint8; a rest of `side` beyond whole patches is left out, as
            a convolution does.
        patch_size: p.
        table: From `PixelRule.table`.

    Returns:
        `[tiles * (side / p)**2, 3 * p * p]` float32, row-major within each tile.
    """
    p, n = patch_size, tiles.shape[1] // patch_size
    blocks = tiles[:, : n * p, : n * p].reshape(-1, n, p, n, p, 3).transpose(0, 1, 3, 5, 2, 4)
    codes = blocks.reshape(-1, 3, p * p)  # [P, 3, p * p] uint8
    patches = np.empty(codes.shape, np.float32)
    for channel in range(3):
        patches[:, channel] = table[channel][codes[:, channel]]
    return patches.reshape(len(patches), -1)
