"""What the operator of a server can set, besides the engine's own config (filled by `cli`)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mgvq_runtime import MediaLimits
from mgvq_runtime.errors import ConfigError

MAX_MB = 1_000_000
MAX_SECONDS = 30 * 24 * 3600


def _flag(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class ServerSettings:
    """Limits and manners of the HTTP server; each field is also a flag of `mgvq-serve`."""

    served_model_name: str | None = _flag(
        None,
        "name of the model on the wire; the name of the checkpoint folder when not given",
    )
    api_key: str | None = _flag(
        None,
        "key that requests to /v1 must bring; without it, everybody who reaches the port may ask",
    )
    max_queue: int = _flag(
        32,
        "most answers that wait besides those that run; more are refused with status 429",
    )
    max_body_mb: float = _flag(
        64,
        "largest request body, in megabytes",
    )
    limit_images: int = _flag(
        8,
        "most images in one request",
    )
    limit_frames: int = _flag(
        64,
        "most frames of videos in one request",
    )
    max_image_mb: float = _flag(
        20,
        "largest image file, in megabytes",
    )
    max_image_pixels: int = _flag(
        50_000_000,
        "largest image, in pixels",
    )
    allowed_local_media_path: Path | None = _flag(
        None,
        "folder below which file:// image URLs may read; none when not given",
    )
    media_threads: int = _flag(
        2,
        "threads that decode and prepare images",
    )
    request_timeout: float = _flag(
        600,
        "seconds after which a request ends with an error, waiting or running; 0 is never",
    )
    sse_ping_interval: float = _flag(
        10,
        "seconds of silence after which a stream sends a comment to stay connected; 0 is never",
    )
    drain_timeout: float = _flag(
        30,
        "seconds that open answers get to finish when the server is told to stop",
    )

    def __post_init__(self) -> None:
        lowest = {"max_queue": 0, "limit_images": 0, "limit_frames": 0}
        lowest |= {"max_image_pixels": 1, "media_threads": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("max_body_mb", "max_image_mb"):
            if not 0 < getattr(self, name) <= MAX_MB:
                raise ConfigError(
                    f"{name} must be above 0 and at most {MAX_MB}, got {getattr(self, name)}"
                )
        for name in ("request_timeout", "sse_ping_interval", "drain_timeout"):
            if not 0 <= getattr(self, name) <= MAX_SECONDS:
                never = "" if name == "drain_timeout" else "; 0 is never"
                raise ConfigError(
                    f"{name} must be from 0 to {MAX_SECONDS} seconds{never}, "
                    f"got {getattr(self, name)}"
                )
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key must not be empty; leave it out for an open server")
        path = self.allowed_local_media_path
        if path is not None and not path.is_dir():
            raise ConfigError(f"allowed_local_media_path must be a folder; {path} is none")
        self.media_limits().check_pillow()

    def media_limits(self) -> MediaLimits:
        """Return how large a picture may be."""
        return MediaLimits(
            max_image_bytes=int(self.max_image_mb * 1e6), max_image_pixels=self.max_image_pixels
        )


def add_settings_arguments(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add a flag for each of these fields of `ServerSettings`, with its default and its help."""
    group = parser.add_argument_group("server")
    by_name = {one.name: one for one in fields(ServerSettings)}
    for name in names:
        one = by_name[name]
        kind = {"int": int, "float": float}.get(str(one.type).split(" ")[0], str)
        kind = Path if "Path" in str(one.type) else kind
        shown = "" if one.default is None else f" (default: {one.default})"
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=one.default,
            metavar=_METAVARS[kind],
            help=one.metadata["help"] + shown,
        )


def settings_from_arguments(arguments: argparse.Namespace) -> ServerSettings:
    """Return the settings of a command line; a field without a flag keeps its default.

    Raises:
        ConfigError: if a value makes no sense.
    """
    given = {one.name for one in fields(ServerSettings)} & vars(arguments).keys()
    return ServerSettings(**{name: getattr(arguments, name) for name in given})


_METAVARS: dict[type, str] = {int: "N", float: "N", str: "TEXT", Path: "DIR"}
