"""Gather tensors into safetensors files of bounded size (called by the writer).

Within a file, tensors lie by falling element size, then name: always aligned, and the same tensors
always give the same bytes. Every file is flushed to the disk before it counts as written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mgvq_runtime.checkpoint.files import digest, unwritable
from mgvq_runtime.checkpoint.manifest import ShardEntry
from mgvq_runtime.checkpoint.spec import TensorSpec
from mgvq_runtime.checkpoint.tensor_file import (
    DTYPE_WORDS,
    encode_header,
    spec_bytes,
    tensor_bytes,
)
from mgvq_runtime.errors import CheckpointError


class ShardWriter:
    """Writes files into one folder; `close` names them and returns their digests."""

    INDEX_NAME = "model.safetensors.index.json"

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Start with no file.

        Args:
            folder: exists and is empty.
            shard_bytes: a file is closed before it would grow beyond this.
        """
        self.folder = folder
        self.index: dict[str, Any] | None = None
        """Contents of the index after `close`; None where one file holds everything."""
        self._shard_bytes = shard_bytes
        self._gathered: dict[str, Tensor] = {}
        self._gathered_bytes = 0
        self._written: list[tuple[Path, ShardEntry]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it may be written now or later, so it must not change any more.

        Raises:
            CheckpointError: if a tensor of that name was added before, or the disk does not take a
                file.
        """
        if name in self._names:
            raise CheckpointError(f"tensor {name} was given twice")
        self._names.add(name)
        if self._gathered and self._gathered_bytes + tensor.nbytes > self._shard_bytes:
            self._write_shard()
        self._gathered[name] = tensor.detach().cpu().contiguous()
        self._gathered_bytes += tensor.nbytes

    def close(self) -> dict[str, ShardEntry]:
        """Write what is left, give the files their final names and make the index.

        Returns:
            Size and digests of every file by name.

        Raises:
            CheckpointError: if the disk does not take a file.
        """
        self._write_shard()
        count = len(self._written)
        entries: dict[str, ShardEntry] = {}
        for number, (path, entry) in enumerate(self._written, start=1):
            name = "model.safetensors"
            if count > 1:
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / name)
            entries[name] = entry
        if count > 1:
            self.index = {
                "metadata": {"total_size": sum(entry.size for entry in entries.values())},
                "weight_map": {t: name for name, entry in entries.items() for t in entry.tensors},
            }
        return entries

    def write_file(self, name: str, pieces: Sequence[bytes | memoryview]) -> int:
        """Write one file of the folder and flush it to the disk.

        Returns:
            Its size in bytes.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        size = sum(len(piece) for piece in pieces)
        path = self.folder / name
        try:
            with path.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(path, error, size) from error
        return size

    def _write_shard(self) -> None:
        tensors = sorted(self._gathered.items(), key=lambda item: (-item[1].itemsize, item[0]))
        specs = {n: TensorSpec(DTYPE_WORDS[t.dtype], tuple(t.shape)) for n, t in tensors}
        header = encode_header(list(specs.items()))
        views = {name: tensor_bytes(tensor) for name, tensor in tensors}
        assert all(len(views[name]) == spec_bytes(specs[name]) for name in specs)
        name = f"shard-{len(self._written) + 1}"
        size = self.write_file(name, [header, *views.values()])
        digests = {name: digest(view) for name, view in views.items()}
        self._written.append((self.folder / name, ShardEntry(size, digest(header), digests)))
        self._gathered, self._gathered_bytes = {}, 0
