"""Digests, capped JSON and safe file names (called by the reader, the writer and the tokenizer).

Knows nothing of tensors. Every function here turns what a damaged or hostile folder can do into a
`CheckpointError` that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mgvq_runtime.errors import CheckpointError

MAX_JSON_BYTES = 16 * 1024**2
"""Largest JSON file read whole; config.json of a 72B model with narrow bands is under 4 MiB."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Names a checkpoint may hold: no folder, no hidden file, nothing a shell would read."""

CHUNK_BYTES = 4 * 1024**2


def digest(data: bytes | bytearray | memoryview) -> str:
    """Return the xxh3-128 of some bytes as 32 hexadecimal digits."""
    return xxhash.xxh3_128(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the xxh3-128 of a file, read in pieces.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    state = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                state.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    return state.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """Return one digest of a folder's weights and config, to recognise a source checkpoint again.

    Args:
        folder: a checkpoint folder; every `*.safetensors` and `config.json` is read.

    Returns:
        "xxh3-128:" and 32 hexadecimal digits; it does not depend on the folder's own name.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    names = sorted([*(p.name for p in folder.glob("*.safetensors")), "config.json"])
    lines = [f"{name} {digest_file(folder / name)}\n" for name in names]
    return "xxh3-128:" + digest("".join(lines).encode())


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file whole.

    Raises:
        CheckpointError: if the file is missing, unreadable or larger than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes, the most that is read")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: if the file is missing, too large, or not one JSON object in UTF-8.
    """
    return parse_json(read_bytes(path, max_bytes), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse the bytes of `path` as one JSON object; a key given twice is refused.

    Raises:
        CheckpointError: if the bytes are not one JSON object in UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be a checkpoint's JSON") from error
    except ValueError as error:  # bad UTF-8, bad JSON, duplicate keys, absurdly long integers
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def to_json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write a JSON object the one way this project writes it: sorted keys, ASCII, final newline.

    Raises:
        CheckpointError: if a value is not JSON, NaN and infinity included.
    """
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be written as JSON: {error}") from error
    return text.encode() + b"\n"


def is_file_name(name: object) -> bool:
    """Say whether a name read from a file may be opened: a plain name inside the folder."""
    return isinstance(name, str) and FILE_NAME.fullmatch(name) is not None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the system will not give us."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing: copy it again from where the folder came from")
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}")


def unwritable(
    path: Path, error: OSError, size: int | None = None, kept: str | None = None
) -> CheckpointError:
    """Return the error for a file that the system will not take, telling how much room it needs.

    Args:
        path: what was being written.
        error: what the system said.
        size: bytes that were to be written; None if unknown.
        kept: what has not been lost.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    needs = "" if size is None else f" of {size:,} bytes"
    message = f"the disk is full: {path}{needs} cannot be written"
    if not full:
        message = f"{path}{needs} cannot be written: {error.strerror or error}"
    with contextlib.suppress(OSError):
        home = next(parent for parent in path.absolute().parents if parent.exists())
        message += f", {shutil.disk_usage(home).free:,} bytes are free"
    advice = "free some space and run it again" if full else "put that right and run it again"
    return CheckpointError(f"{message}; {advice}" + (f" ({kept})" if kept else ""))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} is given twice")
    return result
