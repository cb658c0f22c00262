"""One safetensors file: a header that is checked in full, tensors read one at a time.

Called by the reader and the writer. The bytes are plain safetensors; reading is our own because a
checkpoint is not trusted: nothing is mapped into memory (a file that shrinks meanwhile is an error,
not a crash), every tensor is digested on the very bytes that are returned, and the header leaves
no byte of the file unaccounted for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgvq_runtime.checkpoint.files import digest, parse_json, unreadable
from mgvq_runtime.checkpoint.spec import TensorSpec
from mgvq_runtime.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
LENGTH_BYTES = 8
ALIGNMENT = 8
MAX_HEADER_BYTES = 32 * 1024**2
"""The largest header read; one of a 72B model's shards is under 1 MiB."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    spec: TensorSpec
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's element type."""
        return DTYPES[self.spec.dtype]


@dataclass(frozen=True)
class TensorFile:
    """The checked header of one file."""

    path: Path
    places: Mapping[str, Place]
    """By tensor name, in the file's order."""
    header_digest: str
    """xxh3-128 of everything before the first tensor: length, JSON and padding."""
    file_bytes: int

    def read(self, name: str, expected_digest: str | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: a tensor of this file.
            expected_digest: the xxh3-128 its bytes must have; None checks nothing.

        Returns:
            A new tensor on the CPU that owns its memory, in the stored dtype and shape.

        Raises:
            CheckpointError: if the file is cut short or the digest differs.
        """
        place = self.places[name]
        buffer = torch.empty(place.size, dtype=torch.uint8)
        view = tensor_bytes(buffer)
        try:
            with self.path.open("rb") as file:
                file.seek(place.start)
                filled = _fill(file, view)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if filled != place.size:
            raise CheckpointError(
                f"{self.path}: tensor {name} needs {place.size} bytes at {place.start}, the file "
                f"has {filled} there: copy the file again"
            )
        if expected_digest is not None and (found := digest(view)) != expected_digest:
            raise CheckpointError(
                f"{self.path}: tensor {name} is damaged (digest {found}, the manifest says "
                f"{expected_digest}): copy the file again"
            )
        return buffer.view(place.dtype).view(place.spec.shape)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: if the file is missing, cut short, too long, or its header is malformed.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < LENGTH_BYTES or length > file_bytes - LENGTH_BYTES:
                raise CheckpointError(
                    f"{path} has {file_bytes} bytes, too few for a safetensors file and its "
                    "header: copy the file again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
                )
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(header) != length:
        raise CheckpointError(f"{path} ends inside its header: copy the file again")
    data_start = LENGTH_BYTES + length
    places = _read_places(path, header, data_start, file_bytes)
    return TensorFile(path, places, digest(prefix + header), file_bytes)


def encode_header(tensors: Sequence[tuple[str, TensorSpec]]) -> bytes:
    """Return the length and header of a file that holds these tensors, back to back in this order.

    The JSON is padded with spaces so that the first tensor is aligned to 8 bytes.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in tensors:
        end = offset + spec_bytes(spec)
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def spec_bytes(spec: TensorSpec) -> int:
    """Return the bytes a tensor takes."""
    return DTYPES[spec.dtype].itemsize * math.prod(spec.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes, without a copy; little-endian machines only."""
    flat = tensor.detach().contiguous().reshape(-1)  # [numel]
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data


def _read_places(path: Path, header: bytes, data_start: int, file_bytes: int) -> dict[str, Place]:
    """Check every entry: known dtype, honest size, no gap and no overlap up to the file's end."""
    entries = parse_json(header, path)
    entries.pop("__metadata__", None)
    places: dict[str, Place] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        try:
            places[name] = _read_place(entry, data_start)
        except CheckpointError as error:
            problems.append(f"tensor {name[:200]}: {error}")
    end = data_start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].size)):
        if place.start != end and not problems:
            problems.append(f"tensor {name[:200]} starts at byte {place.start}, expected {end}")
        end = place.start + place.size
    if end != file_bytes and not problems:
        problems.append(f"the tensors end at byte {end}, the file at {file_bytes}")
    if problems:
        raise CheckpointError(f"{path} is damaged: copy the file again", problems)
    return places


def _read_place(entry: object, data_start: int) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("its entry must hold dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError("shape and data_offsets must be lists of whole numbers")
    spec = TensorSpec(dtype, tuple(shape))
    start, end = offsets
    if spec_bytes(spec) != end - start:
        raise CheckpointError(f"{spec} takes {spec_bytes(spec)} bytes, its offsets {end - start}")
    return Place(spec, data_start + start, end - start)


def _whole_numbers(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(number) is int and 0 <= number < 2**62 for number in value)
    )


def _fill(file: BinaryIO, view: memoryview) -> int:
    """Read until `view` is full or the file ends; return the bytes read."""
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return filled
