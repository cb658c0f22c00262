"""Where pictures of a conversation may come from, and where not."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

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
        ({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}, "detail"),
        ({"type": "image", "image": 3}, "a picture must be"),
        ({"type": "image"}, "a picture must be"),
    ],
)
def test_other_sources_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        take_pictures([{"role": "user", "content": [part]}], LIMITS)


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
