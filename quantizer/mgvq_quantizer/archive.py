"""Text and pictures from a folder or a zip file, one way to read both (used by `calibration`).

Paths inside a data file may come from anybody: a path that leaves the folder is refused, and sizes
are checked before bytes are read.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mgvq_runtime.errors import MgvqError
from mgvq_runtime.multimodal.image import MediaLimits

_MAX_TEXT_BYTES = 1 << 30
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class DataError(MgvqError, ValueError):
    """A calibration or question file cannot be used; names the file and the line."""


class Archive:
    """The files under one folder, or inside one zip file."""

    def __init__(self, path: Path) -> None:
        """Open a folder or a zip file.

        Raises:
            DataError: if it is neither.
        """
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if not path.is_dir():
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{path} is neither a folder nor a zip file: {error}") from error

    def names(self) -> list[str]:
        """Return every file's path inside the archive, sorted, with forward slashes."""
        if self._zip is not None:
            return sorted(n for n in self._zip.namelist() if not n.endswith("/"))
        files = (p for p in self.path.rglob("*") if p.is_file())
        return sorted(p.relative_to(self.path).as_posix() for p in files)

    def read(self, name: str, max_bytes: int = _MAX_TEXT_BYTES) -> bytes:
        """Return one file's bytes.

        Raises:
            DataError: if it is missing, too large, damaged or outside the archive.
        """
        self._check(name, max_bytes)
        try:
            return (self.path / name).read_bytes() if self._zip is None else self._zip.read(name)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise DataError(f"{self.path}: {name!r} cannot be read: {error}") from error

    def read_picture(self, name: str) -> bytes:
        """Return a picture's bytes; it may lie in `images/` without the data file saying so."""
        return self.read(self._find(name), MediaLimits().max_image_bytes)

    def check_picture(self, name: str) -> None:
        """Refuse what `read_picture` would refuse without reading it."""
        self._check(self._find(name), MediaLimits().max_image_bytes)

    def _find(self, picture: str) -> str:
        inner = f"images/{picture}"
        return inner if not self._holds(picture) and self._holds(inner) else picture

    def _check(self, name: str, max_bytes: int) -> None:
        """Refuse a file that is missing, too large or outside the archive."""
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or {"\\", "\0"} & set(name):
            raise DataError(f"{self.path}: the path {name!r} leads out of it")
        try:
            if self._zip is not None:
                size = self._zip.getinfo(name).file_size
            else:
                size = (self.path / name).stat().st_size
        except KeyError as error:
            raise DataError(f"{self.path} holds no file {name!r}") from error
        except OSError as error:
            raise DataError(f"{self.path}: {name!r} cannot be read: {error}") from error
        if size > max_bytes:
            raise DataError(f"{self.path}: {name!r} is {size} bytes, the most is {max_bytes}")

    def _holds(self, name: str) -> bool:
        if self._zip is not None:
            return name in self._zip.NameToInfo
        return (self.path / name).is_file()


def read_rows(archive: Archive, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSON-lines file, or of a JSON file that is one list.

    Yields:
        Where the object stands, such as "data.zip, line 3", and the object.

    Raises:
        DataError: naming the line that is no JSON object.
    """
    try:
        text = archive.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{archive.path}: {name!r} is not UTF-8 text: {error}") from error
    place = f"{archive.path}/{name}"
    if name.endswith(".json"):
        rows = _parse(place, text)
        if not isinstance(rows, list):
            raise DataError(f"{place} must hold a list of conversations")
        numbered = [(f"{place}, entry {i}", row) for i, row in enumerate(rows)]
    else:
        lines = enumerate(text.split("\n"), start=1)  # JSON strings may hold other line breaks
        numbered = [
            (f"{place}, line {i}", _parse(f"{place}, line {i}", line))
            for i, line in lines
            if line.strip()
        ]
    for where, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error
