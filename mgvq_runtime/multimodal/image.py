"""Bytes of a picture to pixels, safely (called by serve's `media`, by `llm` and by calibration).

In: bytes or a data URL from anybody. Out: an RGB picture, upright, or `ImageError` in words that
can be shown to a client: no path, no object address, no text of Pillow's. Pixels are decoded only
when somebody needs them: a picture that was sent before is known by its bytes. Never fetches
anything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mgvq_runtime.errors import ConfigError, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are decoded; Pillow knows many more, and each is a door."""

_FORMAT_NAMES = ", ".join(FORMATS)
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    KeyError,
    ZeroDivisionError,
    struct.error,
)
"""What Pillow's decoders raise on damaged input."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

LOW_DETAIL_SIDE = 512
"""Pixels a side of the square that detail "low" scales a picture into, as OpenAI documents it."""


@dataclass(frozen=True)
class MediaLimits:
    """How much a picture may cost before it is refused."""

    max_image_bytes: int = 20 * 1024 * 1024
    """Bytes of one encoded picture."""
    max_image_pixels: int = 50_000_000
    """Width times height, read from the header before anything is decoded."""

    def check_pillow(self) -> None:
        """Refuse pictures larger than Pillow opens.

        Not asked of the defaults: an application may have lowered Pillow's limit, which is one for
        the whole process, not ours to raise, nor to race other threads.

        Raises:
            ConfigError: with both limits.
        """
        if Image.MAX_IMAGE_PIXELS is None or self.max_image_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
            return
        raise ConfigError(
            f"max_image_pixels must be at most {2 * Image.MAX_IMAGE_PIXELS}, the most that Pillow "
            f"opens, got {self.max_image_pixels}"
        )


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture as it came; its header is checked, its pixels are not decoded yet."""

    data: bytes
    """A whole file: JPEG, PNG, WEBP, GIF or BMP."""
    size: tuple[int, int]
    """Width and height, from the header."""
    limits: MediaLimits
    max_side: int | None = None
    """Scaled into a square of so many pixels once decoded."""
    param: str | None = None
    """Where it came from, for errors."""

    @cached_property
    def digest(self) -> bytes:
        """256 bits of all that the decoded picture depends on."""
        digest = hashlib.blake2b(repr(self.max_side).encode(), digest_size=32)
        digest.update(self.data)
        return digest.digest()

    def decode(self) -> Image.Image:
        """Return upright RGB.

        An animated picture gives its first frame. Transparency is laid on white, as Qwen2-VL's
        image processor in transformers does. 16-bit grey is scaled to 8 bits, not clipped.

        Raises:
            ImageError: if the file is damaged or cut short, or larger than its header said.
        """
        file = Image.open(io.BytesIO(self.data), formats=FORMATS)  # read once by open_image
        try:
            file.load()
            _check_size(file.size, self.limits)
            image = to_rgb(_upright(file))
        except ImageError as error:
            raise ImageError(str(error), self.param) from None
        except MemoryError:
            raise ImageError("the picture does not fit into memory", self.param) from None
        except (*_BOMBS, *_DECODER_ERRORS):
            raise ImageError(
                f"the {file.format} picture is damaged or cut short", self.param
            ) from None
        if self.max_side is not None:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
        return image


Picture = Image.Image | EncodedImage
"""A picture, decoded or not."""

Visual = Picture | Sequence[Picture]
"""What a conversation may bring: a picture, or a video as its frames."""


def open_image(data: bytes, limits: MediaLimits | None = None) -> EncodedImage:
    """Look at a picture's header.

    Args:
        data: A whole file: JPEG, PNG, WEBP, GIF or BMP.
        limits: Caps; None takes the defaults.

    Raises:
        ImageError: if it is not such a file, or is over a limit.
    """
    limits = limits or MediaLimits()
    if not data:
        raise ImageError("the picture is empty")
    if len(data) > limits.max_image_bytes:
        raise ImageError(
            f"the picture has {len(data)} bytes, at most {limits.max_image_bytes} are allowed"
        )
    try:
        size = Image.open(io.BytesIO(data), formats=FORMATS).size
    except _BOMBS:
        raise ImageError(f"the picture has more than {limits.max_image_pixels} pixels") from None
    except (UnidentifiedImageError, *_DECODER_ERRORS):
        raise ImageError(
            f"this is not a picture that can be read; known formats: {_FORMAT_NAMES}"
        ) from None
    _check_size(size, limits)
    return EncodedImage(data, size, limits)


def decode_image(data: bytes, limits: MediaLimits | None = None) -> Image.Image:
    """Decode a picture to upright RGB: `open_image` and `EncodedImage.decode` at once.

    Raises:
        ImageError: if it is not a picture, is damaged or cut short, or is over a limit.
    """
    return open_image(data, limits).decode()


def take_pil(image: Image.Image, limits: MediaLimits | None = None) -> Image.Image:
    """Return a PIL image as upright RGB, read from its file where that was not done yet.

    Raises:
        ImageError: if it has no pixels, has more than allowed, or cannot be read.
    """
    _check_size(image.size, limits or MediaLimits())
    try:
        image.load()
        return to_rgb(_upright(image))
    except MemoryError:
        raise ImageError("the picture does not fit into memory") from None
    except (*_BOMBS, *_DECODER_ERRORS, AssertionError, AttributeError):  # the last: a closed file
        raise ImageError(
            f"the PIL image of mode {image.mode} cannot be read: its file is damaged, cut short or "
            "closed already"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency on white, 16-bit grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def open_data_url(url: str, limits: MediaLimits | None = None) -> EncodedImage:
    """Take a picture out of `data:image/...;base64,...` and look at its header.

    Args:
        url: The whole URL.
        limits: Caps; None takes the defaults.

    Raises:
        ImageError: if the URL is not of that form, the base64 is not strict, or as `open_image`.
    """
    limits = limits or MediaLimits()
    head, comma, payload = url.partition(",")
    if not comma or not head[:5].lower() == "data:":
        raise ImageError("a data URL must look like data:image/png;base64,...")
    kind, *parameters = [part.strip().lower() for part in head[5:].split(";")]
    if not kind.startswith("image/"):
        raise ImageError(
            f"a data URL must have a type of image/*, got {kind[:40] or 'none'!r}; "
            f"known formats: {_FORMAT_NAMES}"
        )
    if "base64" not in parameters:
        raise ImageError("a data URL of a picture must be base64: data:image/png;base64,...")
    if len(payload) * 3 // 4 > limits.max_image_bytes + 2:
        raise ImageError(
            f"the picture has about {len(payload) * 3 // 4} bytes, "
            f"at most {limits.max_image_bytes} are allowed"
        )
    try:
        data = base64.b64decode(payload.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ImageError("the data URL is not valid base64") from None
    return open_image(data, limits)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF orientation says; damaged EXIF turns nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image


def _check_size(size: tuple[int, int], limits: MediaLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the picture has no pixels: {width} x {height}")
    if width * height > limits.max_image_pixels:
        raise ImageError(
            f"the picture is {width} x {height} = {width * height} pixels, "
            f"at most {limits.max_image_pixels} are allowed"
        )
