"""What every image processor does, and what they share (used by the processors of the families).

Normalised pixel values are looked up, 256 a channel, so they are transformers' own float32 to the
last bit. Where to cut, and how many tokens come of it, is each family's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.request import ImageInput

CONFIG_NAMES = ("preprocessor_config.json", "processor_config.json")


class ImageProcessor(Protocol):
    """Turns pictures into patches of one family."""

    @classmethod
    def from_folder(cls, path: str | Path, max_image_tokens: int | None = None) -> Self:
        """Read how a checkpoint's pictures are prepared.

        Args:
            path: A checkpoint folder.
            max_image_tokens: Most tokens one picture may take; None leaves it to the checkpoint.

        Raises:
            ConfigError: if the files are missing, or a value in them cannot be honoured.
        """

    @property
    def max_num_tokens(self) -> int:
        """Most tokens any picture can take (for memory planning)."""

    @property
    def max_grid(self) -> tuple[int, int, int]:
        """Grid of the picture that has most patches (for memory planning)."""

    def __call__(self, image: Image.Image, is_alone: bool = True) -> ImageInput:
        """Cut a picture into patches.

        Args:
            image: Of any mode; converted to RGB as `multimodal.image` does.
            is_alone: Whether the conversation has no other picture, where that matters.

        Raises:
            ImageError: if it is of a shape the family does not take.
        """


def read_fields(folder: Path) -> Fields | None:
    """Return what preprocessor_config.json (hub) or processor_config.json (transformers 5) says.

    Returns:
        The image processor's values, None where the folder has neither file.

    Raises:
        ConfigError: if a file is damaged or describes something else.
    """
    for name, key in zip(CONFIG_NAMES, (None, "image_processor"), strict=True):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{file} is not valid JSON") from None
        if key is not None and isinstance(values, dict):
            values = values.get(key)
        if isinstance(values, dict):
            return Fields(values, "", name)
        raise ConfigError(f"{file} does not describe an image processor")
    return None


def required_fields(folder: Path) -> Fields:
    """Return `read_fields`; raise ConfigError where there is neither file."""
    fields = read_fields(folder)
    if fields is None:
        raise ConfigError(
            f"{folder} has neither {' nor '.join(CONFIG_NAMES)}: "
            "how pictures are prepared is part of a checkpoint"
        )
    return fields


def check_steps(fields: Fields, names: Sequence[str]) -> None:
    """Refuse a processor that leaves out one of the steps `names`, which ours always does."""
    for name in names:
        if not fields.boolean(name, default=True):
            fields.refuse(name, False, "true: nothing else is implemented")


def read_resample(fields: Fields) -> int:
    """Return PIL's number of the resampling filter."""
    resample = fields.integer("resample", default=int(Image.Resampling.BICUBIC), low=0)
    if resample not in list(Image.Resampling):
        fields.refuse("resample", resample, "a resampling filter of PIL, 0 to 5")
    return resample


def read_normalisation(
    fields: Fields, mean: Sequence[float], std: Sequence[float]
) -> Mapping[str, Any]:
    """Return `image_mean`, `image_std` and `rescale_factor`, as arguments of a processor."""
    deviations = fields.numbers("image_std", 3, default=std)
    if min(deviations) <= 0:
        fields.refuse("image_std", list(deviations), "three numbers above 0")
    return {
        "image_mean": fields.numbers("image_mean", 3, default=mean),
        "image_std": deviations,
        "rescale_factor": fields.number("rescale_factor", default=1 / 255),
    }


def pixel_table(
    mean: Sequence[float], std: Sequence[float], rescale_factor: float
) -> npt.NDArray[np.float32]:
    """Return `[3, 256]` float32: what each pixel value becomes, in transformers' rounding."""
    scaled = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def cut_tiles(
    tiles: npt.NDArray[np.uint8], patch_size: int, table: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Cut square tiles into normalised patches.

    Args:
        tiles: `[tiles, side, side, 3]` uint8; a rest of `side` beyond whole patches is left out, as
            a convolution does.
        patch_size: p.
        table: From `pixel_table`.

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
