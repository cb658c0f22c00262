"""Open a checkpoint folder, ours or an unquantized one of Hugging Face (called by models.loading).

The reader is total: before the first tensor is read, every file, name, dtype and shape has been
compared with what the folder says of itself, and every digest is checked on the bytes that are
handed out. What is wrong comes as one `CheckpointError` with the whole list. Not here: which
parameters a model needs (`mgvq_runtime.models.loading` compares), packing, devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels.layout import VQWeight
from mgvq_runtime.checkpoint import hf_folder
from mgvq_runtime.checkpoint.bits import check_claims
from mgvq_runtime.checkpoint.files import read_json
from mgvq_runtime.checkpoint.manifest import (
    CONFIG_NAME,
    DAMAGED,
    MANIFEST_NAME,
    Manifest,
    check_files,
    read_manifest,
)
from mgvq_runtime.checkpoint.spec import (
    CODEBOOK_PREFIX,
    MatrixSpec,
    QuantizationSpec,
    TensorSpec,
    is_module_name,
    quantized_tensors,
)
from mgvq_runtime.checkpoint.tensor_file import DTYPES, TensorFile, open_tensor_file
from mgvq_runtime.errors import CheckpointError


@dataclass(frozen=True)
class DenseTensor:
    """One unquantized parameter: what will be handed out, and what it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[TensorFile, str], ...]
    """Stacked along the rows; all but `shape` of a single part is kept."""
    row_groups: tuple[int, int] | None = None
    """Where rows lie by key/value head: how many there are, and query heads of each."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. Headers are checked; tensors are read when asked for."""

    path: Path
    config: dict[str, Any]
    """config.json as it is."""
    quantization: QuantizationSpec | None
    """None for an unquantized folder."""
    dense: Mapping[str, DenseTensor]
    """Every unquantized parameter by our name, with its shape and dtype; nothing is read yet."""
    files: Mapping[str, TensorFile]
    """Where each tensor on disk lies, by its name on disk."""
    manifest: Manifest | None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read the unquantized parameters, one at a time.

        Yields:
            Our parameter name and a new CPU tensor, in the dtype on disk; projections that we keep
            fused arrive fused.

        Raises:
            CheckpointError: if a tensor is damaged; the message lists every damaged one.
        """
        for name in self.dense:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Read one unquantized parameter, as `tensors` yields it.

        Args:
            name: one of `dense`.

        Raises:
            CheckpointError: if a tensor is damaged; the message lists every damaged one.
        """
        dense = self.dense[name]
        parts = [self._read(part) for _, part in dense.parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if dense.row_groups is not None:
            whole = sort_heads(whole, *dense.row_groups)
        return whole.reshape(dense.shape)

    def vq_weights(self) -> Iterator[tuple[str, VQWeight]]:
        """Read the quantized matrices, one at a time.

        Yields:
            Module name, such as "model.layers.0.mlp.down_proj", and its weight in logical order on
            the CPU. Matrices that share a codebook share its tensor.

        Raises:
            CheckpointError: if a tensor is damaged or holds what cannot be; damaged ones are all
                listed.
        """
        if self.quantization is None:
            return
        shared: dict[str, Tensor] = {}
        for name, matrix in self.quantization.matrices.items():
            yield name, self._read_matrix(name, matrix, shared)

    def verify(self) -> None:
        """Read every tensor and check its digest, building nothing.

        Raises:
            CheckpointError: listing every damaged tensor. An unquantized folder has no digests:
                there only reading itself can fail.
        """
        problems = []
        for name in self.files:
            try:
                self._read_unchecked(name)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(f"{self.path} is damaged: copy it again", problems)

    def _read_matrix(self, name: str, matrix: MatrixSpec, shared: dict[str, Tensor]) -> VQWeight:
        codes, books, book_scales = [], [], []
        for b, names in enumerate(matrix.codebooks):
            stages = range(len(names))
            codes.append(tuple(self._read(f"{name}.codes.{b}.{s}") for s in stages))
            places = [
                (f"{name}.codebook.{b}.{s}", f"{name}.codebook_scale.{b}.{s}")
                if names[s] is None
                else (f"{CODEBOOK_PREFIX}.{names[s]}", f"{CODEBOOK_PREFIX}.{names[s]}.scale")
                for s in stages
            ]
            books.append(tuple(self._read(book, shared) for book, _ in places))
            book_scales.append(tuple(self._read(scale, shared) for _, scale in places))
        layout = matrix.layout
        permutation = self._read(f"{name}.permutation").int() if layout.has_permutation else None
        scales = self._read(f"{name}.scales")
        finite = all(bool(torch.isfinite(scale)) for row in book_scales for scale in row)
        if not finite or not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{self.path}: a scale of {name} is not a finite number")
        try:
            return VQWeight(
                layout, tuple(codes), tuple(books), tuple(book_scales), scales, permutation
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: matrix {name}: {error}") from error

    def _read(self, name: str, shared: dict[str, Tensor] | None = None) -> Tensor:
        """Read one tensor; a shared codebook only the first time."""
        cache = shared if shared is not None and name.startswith(f"{CODEBOOK_PREFIX}.") else None
        if cache is not None and name in cache:
            return cache[name]
        try:
            tensor = self._read_unchecked(name)
        except CheckpointError:
            self.verify()  # lists every damaged tensor, this one among them
            raise
        if cache is not None:
            cache[name] = tensor
        return tensor

    def _read_unchecked(self, name: str) -> Tensor:
        file = self.files[name]
        if self.manifest is None:
            return file.read(name)
        return file.read(name, self.manifest.shards[file.path.name].tensors[name])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder and check everything that can be checked without reading tensors.

    Args:
        path: an MGVQ checkpoint, or an unquantized folder (safetensors, whole or in shards, names
            as on the hub or as transformers 5 writes them).

    Returns:
        The opened checkpoint; no tensor has been read.

    Raises:
        CheckpointError: if anything is missing, damaged, unlisted, unknown or of another shape than
            announced, with the list; `.problems` has one sentence each.
    """
    folder = Path(path).expanduser()
    try:
        return _open(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise CheckpointError(
            f"checkpoint {folder} {what}; expected a folder with config.json and *.safetensors"
        )
    if (folder / MANIFEST_NAME).exists():
        return _open_mgvq(folder)
    if not (folder / CONFIG_NAME).is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}, so it is no checkpoint; found {found}"
        )
    config = read_json(folder / CONFIG_NAME)
    if config.get("quantization_config") is not None:  # null says that there is none
        QuantizationSpec.from_json(config["quantization_config"])
        raise CheckpointError(f"{folder}: {MANIFEST_NAME} is missing: {DAMAGED}")
    return _open_dense(folder, config)


def _open_mgvq(folder: Path) -> Checkpoint:
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest)
    if CONFIG_NAME not in manifest.files:
        problems.append(f"{MANIFEST_NAME} does not list {CONFIG_NAME}")
    if problems:
        raise CheckpointError(f"{folder} is not the checkpoint that was written", problems)
    config = read_json(folder / CONFIG_NAME)
    quantization = QuantizationSpec.from_json(config.get("quantization_config"))
    version = config["quantization_config"]["format_version"]
    if version != manifest.format_version:
        problems.append(
            f"format_version is {version} in {CONFIG_NAME} and {manifest.format_version} in "
            f"{MANIFEST_NAME}"
        )
    files: dict[str, TensorFile] = {}
    for name, shard in manifest.shards.items():
        file = open_tensor_file(folder / name)
        if file.header_digest != shard.header_digest:
            problems.append(f"{name}: the header is damaged: {DAMAGED}")
        if set(file.places) != set(shard.tensors):
            problems.append(f"{name}: its tensors are not those the manifest lists")
        problems += [
            f"{name}: tensor {t} is in another shard too" for t in file.places if t in files
        ]
        files.update(dict.fromkeys(file.places, file))
    expected = quantized_tensors(quantization)
    problems += _compare(expected, {name: file.places[name].spec for name, file in files.items()})
    dense = {}
    for name, file in files.items():
        spec = file.places[name].spec
        if name in expected:
            continue
        if not is_module_name(name) or spec.dtype != "F16":
            problems.append(f"{name} ({spec}) is neither part of a matrix nor an F16 parameter")
        dense[name] = DenseTensor(spec.shape, DTYPES[spec.dtype], ((file, name),))
    problems += [
        f"{n} is quantized and dense" for n in quantization.matrices if f"{n}.weight" in dense
    ]
    if problems:
        raise CheckpointError(f"{folder} contradicts itself", problems)
    check_claims(quantization)
    return Checkpoint(folder, config, quantization, dense, files, manifest)


def _open_dense(folder: Path, config: dict[str, Any]) -> Checkpoint:
    files = hf_folder.open_files(folder)
    dense = {
        name: DenseTensor(p.shape, p.dtype, tuple((files[x], x) for x in p.parts), p.row_groups)
        for name, p in hf_folder.parameters(folder, files, config).items()
    }
    return Checkpoint(folder, config, None, dense, files, None)


def sort_heads(rows: Tensor, num_groups: int, queries: int) -> Tensor:
    """Reorder rows that lie by key/value head, its queries, its key, its value, to q, k, v.

    Args:
        rows: `[num_groups * (queries + 2) * Dh, ...]`.
        num_groups: Key/value heads.
        queries: Query heads of each.

    Source: OpenGVLab/InternVL2-2B, modeling_internlm2.py, InternLM2Attention.forward.
    """
    heads = rows.reshape(num_groups, queries + 2, -1, *rows.shape[1:])  # [Hk, g + 2, Dh, ...]
    parts = torch.split(heads, [queries, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def _compare(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> list[str]:
    """List the tensors of quantized matrices that are missing or not what the spec says."""
    problems = []
    for name, spec in expected.items():
        if name not in found:
            problems.append(f"tensor {name} ({spec}) is missing")
        elif found[name] != spec:
            problems.append(f"tensor {name} is {found[name]}, the spec says {spec}")
    return problems
