"""Where pictures of a conversation may come from, and where not."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.errors import ImageError, RequestError
from mgvq_runtime.multimodal.image import MediaLimits
from mgvq_runtime.pictures import open_picture, take_pictures

LIMITS = MediaLimits()
RED = Image.new("RGB", (8, 6), (255, 0, 0))


def decoded(picture: Any) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else picture.decode()


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "a red one.png"
    RED.save(path)
    return path


def test_a_path_a_file_url_a_data_url_and_an_image_are_the_same_picture(png: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
    for source in (png, str(png), png.as_uri(), data, RED, RED.convert("RGBA")):
        picture = decoded(open_picture(source, LIMITS))
        assert (picture.mode, picture.size) == ("RGB", (8, 6))
        assert picture.tobytes() == RED.tobytes()


def test_pictures_are_taken_in_order_and_the_rest_is_left_alone() -> None:
    blue = Image.new("RGB", (4, 4), (0, 0, 255))
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": RED},
                {"type": "text", "text": "and"},
                {"type": "image", "image": blue},
                {"type": "video", "video": [blue, RED]},
                {"type": "audio"},
            ],
        },
    ]
    cleaned, pictures = take_pictures(messages, LIMITS)
    *pictures, video = pictures
    assert [decoded(picture).getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]
    assert [decoded(frame).getpixel((0, 0)) for frame in video] == [(0, 0, 255), (255, 0, 0)]
    assert cleaned[0] == messages[0]
    kinds = [part["type"] for part in cleaned[1]["content"]]
    assert kinds == ["image", "text", "image", "video", "audio"]
    assert "image" not in cleaned[1]["content"][0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "clip.mp4"}, "a list of frames, got str: video files are not"),
        ({"type": "video"}, "a list of frames, got NoneType"),
        ({"type": "video", "video": [RED, "https://x.org/a.png"]}, "not fetched"),
        ({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, "not fetched"),
        ({"type": "image_url", "image_url": {}}, "needs"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "huge"}}, "low or high, got"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": ["low"]}}, "low or high, got"),
        ({"type": "image", "image": 3}, "a picture must be"),
        ({"type": "image"}, "a picture must be"),
    ],
)
def test_other_sources_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        take_pictures([{"role": "user", "content": [part]}], LIMITS)


@pytest.mark.parametrize(
    ("detail", "size"), [("low", (512, 341)), ("high", (900, 600)), ("auto", (900, 600))]
)
def test_low_detail_is_a_smaller_picture(
    tmp_path: Path, detail: str, size: tuple[int, int]
) -> None:
    """As over HTTP."""
    path = tmp_path / "large.png"
    Image.new("RGB", (900, 600)).save(path)
    part = {"type": "image_url", "image_url": {"url": str(path), "detail": detail}}
    _, (picture,) = take_pictures([{"role": "user", "content": [part]}], LIMITS)
    assert decoded(picture).size == size


def closed(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def cut_short(path: Path) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Image.open(io.BytesIO(path.read_bytes()[:5000]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_short, "of mode RGB cannot be read: its file is damaged, cut short or closed"),
        (closed, "cannot be read"),
        (lambda _: Image.new("RGB", (0, 5)), "has no pixels: 0 x 5"),
        (lambda _: Image.new("RGB", (5, 0)), "has no pixels: 5 x 0"),
        (lambda _: Image.new("L", (101, 100)), "101 x 100 = 10100 pixels, at most 10000"),
    ],
)
def test_a_pil_image_that_cannot_be_shown_is_an_image_error(
    png: Path, make: Callable[[Path], Image.Image], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        open_picture(make(png), MediaLimits(max_image_pixels=10_000))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_a_pil_image_is_turned_upright_and_damaged_exif_turns_nothing() -> None:
    image = Image.new("RGB", (8, 6))
    image.info["exif"] = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    assert decoded(open_picture(image, LIMITS)).size == (8, 6)
    image = Image.new("RGB", (8, 6))
    image.getexif()[0x0112] = 6
    assert decoded(open_picture(image, LIMITS)).size == (6, 8)


@pytest.mark.parametrize("source", ["a\0b", "file:///a%00b", "file://[x/a.png", Path("a\0b")])
def test_what_is_no_path_at_all_is_an_image_error(source: Any) -> None:
    with pytest.raises(ImageError, match="cannot read the picture"):
        open_picture(source, LIMITS)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nothing.png: No such file"):
        open_picture(str(tmp_path / "nothing.png"), LIMITS)
    with pytest.raises(ImageError, match="cannot read the picture"):
        open_picture(tmp_path, LIMITS)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match="not a picture"):
        open_picture(tmp_path / "text.png", LIMITS)


def test_a_file_over_the_limit_is_refused(png: Path) -> None:
    with pytest.raises(ImageError, match="at most 10"):
        open_picture(png, MediaLimits(max_image_bytes=10))
