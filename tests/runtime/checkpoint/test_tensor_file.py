"""One safetensors file: agreement with the reference implementation, and hostile headers."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mgvq_runtime.checkpoint.tensor_file import open_tensor_file
from mgvq_runtime.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int32),
    "d": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads_what_the_reference_implementation_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt"})
    file = open_tensor_file(path)
    assert set(file.places) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read, tensor)
        read += 1  # owns its memory
        assert torch.equal(file.read(name), tensor)


def entry(start: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "must hold a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (b'{"a":' * 50_000, b"", "nested too deeply"),
        (b'{"a": 1, "a": 2}', b"", "key 'a' is given twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
        ({"a": 3}, b"", "must hold dtype, shape and data_offsets"),
        ({"a": {**entry(0, 1, [1]), "x": 1}}, b"1", "nothing else"),
        ({"a": entry(0, 1, [1], "F8_E4M3")}, b"1", "dtype 'F8_E4M3' is not one of"),
        ({"a": entry(0, 1, [True])}, b"1", "whole numbers"),
        ({"a": entry(0, 1, [-1])}, b"1", "whole numbers"),
        ({"a": entry(0, 1, [1] * 9)}, b"1", "whole numbers"),
        ({"a": entry(0, 1, [2**62])}, b"1", "whole numbers"),
        ({"a": entry(0, 1, [2**31, 2**31])}, b"1", "its offsets 1"),
        ({"a": entry(0, 3, [2])}, b"123", "takes 2 bytes, its offsets 3"),
        ({"a": entry(2, 0, [2])}, b"12", "takes 2 bytes, its offsets -2"),
        ({"a": entry(0, 2, [2])}, b"1", "end at byte"),
        ({"a": entry(0, 2, [2])}, b"123", "the file at"),
        ({"a": entry(1, 3, [2])}, b"123", "starts at byte"),
        ({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"123", "starts at byte"),
        ({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"123", "starts at byte"),
        ({}, b"1", "the file at"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        open_tensor_file(path)


@pytest.mark.parametrize("length", [3, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_never_allocated(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="too few for"):
        open_tensor_file(write_raw(tmp_path / "x.safetensors", b"{}", length=length))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # sparse
    with pytest.raises(CheckpointError, match="has a header of 1073741824 bytes"):
        open_tensor_file(path)


def test_short_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="has 4 bytes"):
        open_tensor_file(tmp_path / "x")
    with pytest.raises(CheckpointError, match="is missing"):
        open_tensor_file(tmp_path / "y")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_tensor_file(tmp_path)


def test_what_is_accepted_is_what_the_reference_implementation_reads(tmp_path: Path) -> None:
    """Random byte damage: refused, or read exactly as safetensors reads it."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    original = path.read_bytes()
    draw = random.Random(3)
    accepted = 0
    for _ in range(200):
        data = bytearray(original)
        for _ in range(draw.choice([1, 1, 3])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: len(data) - draw.choice([0, 0, 0, 1])])
        try:
            file = open_tensor_file(path)
        except CheckpointError:
            continue
        accepted += 1
        theirs = safetensors.torch.load_file(path)
        assert set(theirs) == set(file.places)
        for name, tensor in theirs.items():
            assert tensor.dtype == file.places[name].dtype
            ours = file.read(name)
            assert ours.shape == tensor.shape
            assert torch.equal(ours.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert accepted > 10
