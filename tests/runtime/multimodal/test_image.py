"""Decoding pictures from strangers: every format, every trick, words that leak nothing."""

from __future__ import annotations

import base64
import io
import random
import re
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.errors import ConfigError, ImageError
from mgvq_runtime.multimodal.image import (
    FORMATS,
    MediaLimits,
    decode_image,
    open_data_url,
    open_image,
)

# Pillow warns about odd metadata of damaged files; what counts here is what is decoded or said.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def picture(width: int = 12, height: int = 8) -> Image.Image:
    x = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.5, 0.2])
    y = np.linspace(0, 90, height)[:, None, None] * np.array([0.0, 1.0, 1.0])
    return Image.fromarray((x + y).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds a few hundred bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encoded(picture(), kind, **options))
    assert (image.mode, image.size) == ("RGB", (12, 8))
    error = np.abs(np.asarray(image).astype(int) - np.asarray(picture()).astype(int)).max()
    assert error <= {"JPEG": 60, "GIF": 60}.get(kind, 0)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX"])
def test_other_formats_are_refused_by_name_of_the_known(kind: str) -> None:
    with pytest.raises(ImageError, match="known formats: JPEG, PNG, WEBP, GIF, BMP"):
        decode_image(encoded(picture(32, 32), kind))


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_not_a_picture(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


def test_empty() -> None:
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")


def test_too_many_bytes() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(ImageError, match=f"{len(data)} bytes, at most 50"):
        decode_image(data, MediaLimits(max_image_bytes=50))
    decode_image(data, MediaLimits(max_image_bytes=len(data)))


@pytest.mark.parametrize("size", [(10_000, 10_000), (13_000, 13_000), (60_000, 60_000)])
def test_a_few_bytes_that_claim_many_pixels(size: tuple[int, int]) -> None:
    """100, 169 and 3600 megapixels: below, above and far above Pillow's own alarm."""
    data = png_of_size(*size)
    assert len(data) < 1000
    start = time.perf_counter()
    with pytest.raises(ImageError, match="pixels"):
        decode_image(data)
    assert time.perf_counter() - start < 0.5


def test_pixel_limit_is_exact() -> None:
    data = encoded(picture(12, 8), "PNG")
    decode_image(data, MediaLimits(max_image_pixels=96))
    with pytest.raises(ImageError, match="12 x 8 = 96 pixels, at most 95"):
        decode_image(data, MediaLimits(max_image_pixels=95))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_limit_above_pillows_own_is_refused_when_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 178_956_970
    image = open_image(png_of_size(13_000, 13_000), MediaLimits(max_image_pixels=most))
    assert image.size == (13_000, 13_000)
    with pytest.raises(ConfigError, match=f"at most {most}, the most that Pillow opens, got"):
        MediaLimits(max_image_pixels=most + 1).check_pillow()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    decode_image(encoded(picture(12, 8), "PNG"))  # an application that lowered it can go on


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_short(kind: str) -> None:
    data = encoded(picture(200, 200), kind)
    for share in (0.5, 0.9):
        with pytest.raises(ImageError):
            decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bytes_never_raise_anything_else(kind: str) -> None:
    """And what is said shows neither an address nor a path."""
    rng = random.Random(kind)
    data = encoded(picture(40, 30), kind)
    messages = []
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            image = decode_image(bytes(damaged), MediaLimits(max_image_pixels=10**6))
            assert image.mode == "RGB"
        except ImageError as error:
            messages.append(str(error))
    assert messages
    for message in messages:
        assert not re.search(r"0x[0-9a-f]+|BytesIO|object at|/|\\", message), message


def test_exif_orientation() -> None:
    upright = picture(12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    image = decode_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_damaged_exif_does_not_cost_the_picture() -> None:
    image = decode_image(encoded(picture(), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert image.size == (12, 8)


def test_transparency_is_laid_on_white() -> None:
    """As Qwen2-VL's processor in transformers: black ink on nothing stays readable."""
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert np.asarray(decode_image(encoded(image, "PNG"))).min() == 255
    image.putalpha(128)
    middle = np.asarray(decode_image(encoded(image, "PNG")))[0, 0]
    assert all(120 <= value <= 135 for value in middle)


def test_palette_with_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    pixels = np.asarray(decode_image(encoded(image, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[3, 3].tolist() == [200, 100, 50]


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    r, g, b = np.asarray(decode_image(encoded(red, "JPEG")))[8, 8].astype(int)
    assert r > 200
    assert max(g, b) < 60


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    """Pillow's own conversion clips: everything above 255 of 65535 would be white."""
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = Image.fromarray(levels)
    assert image.mode == "I;16"
    pixels = np.asarray(decode_image(encoded(image, "PNG")))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_16_bit_colour() -> None:
    """Pillow keeps the upper byte: the same rule as for grey."""
    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x00FF)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b"")
    assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    r, g, b = np.asarray(decode_image(data))[4, 4]
    assert (r > 200, g < 60, b < 60) == (True, True, True)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_data_url() -> None:
    data = encoded(picture(), "PNG")
    expected = np.asarray(picture())
    for url in (data_url(data), data_url(data, "image/jpeg"), data_url(data, "IMAGE/PNG;name=a")):
        assert np.array_equal(np.asarray(open_data_url(url).decode()), expected)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/a.png", "must look like data:image/png;base64,"),
        ("data:image/png;base64", "must look like data:image/png;base64,"),
        ("data:text/html;base64,aGk=", r"type of image/\*, got 'text/html'"),
        ("data:;base64,aGk=", "got 'none'"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64,a b c d", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,ab\u00e9d", "not valid base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
    ],
)
def test_data_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_data_url(url)


def test_long_data_url_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="at most 1000 are allowed"):
        open_data_url("data:image/png;base64," + "!" * 4000, MediaLimits(max_image_bytes=1000))


def test_a_path_is_not_an_error_message(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ImageError) as error:
        decode_image((tmp_path / "a.png").read_bytes())
    assert str(tmp_path) not in str(error.value)


def test_only_the_header_is_read_until_pixels_are_needed() -> None:
    data = encoded(picture(64, 48), "PNG")
    cut = open_image(data[: len(data) // 2])
    assert cut.size == (64, 48)
    with pytest.raises(ImageError, match="damaged or cut short") as caught:
        replace(cut, param="messages[3]").decode()
    assert caught.value.param == "messages[3]"
    assert replace(open_image(data), max_side=16).decode().size == (16, 12)


def test_a_digest_is_of_the_bytes_and_of_what_is_done_to_them() -> None:
    one, other = (open_image(encoded(picture(64, 48), kind)) for kind in ("PNG", "BMP"))
    same = open_image(encoded(picture(64, 48), "PNG"))
    small = replace(one, max_side=16)
    assert one.digest == same.digest == replace(one, param="x").digest
    assert len({one.digest, other.digest, small.digest}) == 3
