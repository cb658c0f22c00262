"""Takes the pictures and videos out of a conversation (called by `llm.LLM`).

Data URLs, files and PIL images are read here, the network never. Limits and decoding are in
`multimodal.image`; what becomes of the pixels is `multimodal.processors`' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from PIL import Image

from mgvq_runtime.errors import ImageError, RequestError
from mgvq_runtime.multimodal.image import (
    LOW_DETAIL_SIDE,
    EncodedImage,
    MediaLimits,
    Picture,
    Visual,
    open_data_url,
    open_image,
    take_pil,
)

DETAILS = (None, "auto", "low", "high")
"""How closely to look at a picture; "low" is scaled down, the others are as they come."""

Message = Mapping[str, Any]
"""{"role": ..., "content": text, or a list of text and image parts}, as in OpenAI's chat API."""


def take_pictures(
    messages: Sequence[Message], limits: MediaLimits
) -> tuple[list[Message], list[Visual]]:
    """Read what a conversation shows and leave `{"type": "image" | "video"}` in its places.

    All else stays as it is: `multimodal.chat` says what is wrong with it.

    Args:
        messages: Messages whose content is text or a list of parts. A picture is a part
            `{"type": "image_url", "image_url": {"url": data URL, file:// URL or path}}` or
            `{"type": "image", "image": PIL image or path}`; a video is `{"type": "video", "video":
            [frames]}`, each frame a PIL image, a path or a URL as above. `"detail": "low"` beside a
            url scales the picture into a square of 512 pixels.
        limits: How large a picture may be, and a frame.

    Returns:
        The messages without pictures, and the pictures in order, decoded only where they came so, a
        video as its frames.

    Raises:
        RequestError: if an image or video part has another form.
        ImageError: if a picture cannot be read.
    """
    visuals: list[Visual] = []
    cleaned: list[Message] = []
    for message in messages:
        parts = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(parts, list | tuple):
            parts = [_take_part(part, limits, visuals) for part in parts]
            message = {**message, "content": parts}
        cleaned.append(message)
    return cleaned, visuals


def _take_part(part: Any, limits: MediaLimits, visuals: list[Visual]) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image_url":
        visuals.append(_open_image_url(part.get("image_url"), limits))
    elif kind == "image":
        visuals.append(open_picture(part.get("image"), limits))
    elif kind == "video":
        frames = part.get("video")
        if not isinstance(frames, list | tuple):
            raise RequestError(
                f"a video must be a list of frames, got {type(frames).__name__}: video files are "
                "not decoded here",
                param="messages",
            )
        visuals.append([open_picture(frame, limits) for frame in frames])
        return {"type": "video"}
    else:
        return part
    return {"type": "image"}


def _open_image_url(source: Any, limits: MediaLimits) -> Picture:
    """Open `{"url": ..., "detail": ...}`, or the url alone."""
    url, detail = source, None
    if isinstance(source, Mapping):
        url, detail = source.get("url"), source.get("detail")
    if not isinstance(url, str):
        raise RequestError('an image_url part needs {"url": ...}', param="messages")
    if detail not in DETAILS:
        raise RequestError(
            f"image_url.detail must be auto, low or high, got {str(detail)[:40]!r}",
            param="messages",
        )
    picture = open_picture(url, limits)
    if detail == "low":
        assert isinstance(picture, EncodedImage), "a url is never a PIL image"
        return replace(picture, max_side=LOW_DETAIL_SIDE)
    return picture


def open_picture(source: Any, limits: MediaLimits) -> Picture:
    """Return a PIL image as RGB, anything else undecoded.

    Args:
        source: A PIL image, a path, a `file://` URL or a data URL.
        limits: How large it may be.

    Raises:
        RequestError: if the source is of another kind, such as an http URL.
        ImageError: if it cannot be read or is no picture.
    """
    if isinstance(source, Image.Image):
        return take_pil(source, limits)
    if isinstance(source, Path):
        return _open_file(source, limits)
    if not isinstance(source, str):
        raise RequestError(
            f"a picture must be a PIL image, a path or a URL, got {type(source).__name__}",
            param="messages",
        )
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        return open_data_url(source, limits)
    if scheme in ("http", "https"):
        raise RequestError(
            "pictures are not fetched from the network here: download the file and give its path",
            param="messages",
        )
    if scheme == "file":
        return _open_file(source, limits)
    return _open_file(Path(source), limits)


def _open_file(source: Path | str, limits: MediaLimits) -> Picture:
    """Read a path, in which ~ is the home, or a file URL."""
    try:
        if isinstance(source, str):
            path = Path(url2pathname(urlparse(source).path))
        else:
            path = source.expanduser()
        with path.open("rb") as file:
            data = file.read(limits.max_image_bytes + 1)
    except OSError as error:
        raise ImageError(f"cannot read the picture {path}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # a NUL, a URL whose host is none, no such home
        raise ImageError(f"cannot read the picture {str(source)!r}: {error}") from None
    return open_image(data, limits)
