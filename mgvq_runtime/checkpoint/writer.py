"""Write an MGVQ checkpoint, all of it or nothing (called by the quantizer).

Everything goes into a temporary folder beside the target, is flushed to the disk, read back and
only then renamed. What the caller claims (spec, layouts, shared codebooks) is compared with what it
hands over; bits a weight are counted here, not believed. Not here: quantizing, choosing files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels.layout import VQWeight
from mgvq_runtime.checkpoint.bits import counted_bits_per_weight
from mgvq_runtime.checkpoint.files import (
    MAX_JSON_BYTES,
    digest,
    is_file_name,
    to_json_bytes,
    unwritable,
)
from mgvq_runtime.checkpoint.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
)
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.shards import ShardWriter
from mgvq_runtime.checkpoint.spec import (
    CODEBOOK_PREFIX,
    MatrixSpec,
    QuantizationSpec,
    codebook_tensors,
    is_module_name,
    matrix_tensors,
)
from mgvq_runtime.errors import CheckpointError

SHARD_BYTES = 4_000_000_000
"""A file is closed before it grows beyond this; until then its tensors are held in memory."""
ALLOWED_SUFFIXES = ("", ".html", ".json", ".jinja", ".md", ".txt", ".zip")
"""Of files that travel along; nothing that could be executed or unpickled."""


def write_checkpoint(
    out_dir: str | Path,
    config: Mapping[str, Any],
    quantization: QuantizationSpec,
    dense: Iterable[tuple[str, Tensor]],
    weights: Iterable[tuple[str, VQWeight]],
    copy_files: Sequence[Path] = (),
    extra_files: Mapping[str, bytes] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder atomically.

    Args:
        out_dir: the folder to make; its parent is made if need be.
        config: the source model's config.json; `quantization_config` is put in.
        quantization: every matrix's format; counted `bits_per_weight` are filled in, "target" kept.
        dense: our parameter name and a floating-point tensor on any device, stored as float16; may
            be a generator, consumed once.
        weights: module name and weight, for exactly the matrices of `quantization`; likewise.
        copy_files: tokenizer, template, preprocessor and generation config: copied as they are.
        extra_files: file name to contents.
        overwrite: whether an MGVQ checkpoint that is there already is replaced, once the new one
            is complete; any other folder that is not empty is always refused.

    Returns:
        The folder.

    Raises:
        CheckpointError: if what was handed over contradicts itself or cannot be stored, the folder
            may not be replaced, or the disk is full; nothing is left behind.
    """
    target = Path(out_dir).expanduser().resolve()
    files = _gather_files(copy_files, extra_files or {})
    files[CONFIG_NAME] = _config_bytes(config, quantization)
    try:
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        shards = ShardWriter(partial, SHARD_BYTES)
        _write_tensors(shards, quantization, dense, weights)
        entries = shards.close()
        if shards.index is not None:
            files[shards.INDEX_NAME] = to_json_bytes(shards.index)
        for name, data in files.items():
            shards.write_file(name, [data])
        sizes = {name: FileEntry(len(data), digest(data)) for name, data in files.items()}
        manifest = Manifest(sizes, entries, quantization.format_version).to_bytes()
        shards.write_file(MANIFEST_NAME, [manifest])
        open_checkpoint(partial)
        _publish(partial, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well
    return target


def remove_leftovers(out_dir: str | Path) -> None:
    """Delete the folders that a killed `write_checkpoint` left beside its target.

    Args:
        out_dir: the target; nobody else may be writing it now.
    """
    target = Path(out_dir).expanduser().resolve()
    for folder in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(
    shards: ShardWriter,
    quantization: QuantizationSpec,
    dense: Iterable[tuple[str, Tensor]],
    weights: Iterable[tuple[str, VQWeight]],
) -> None:
    """Hand every tensor to the shards, comparing it with the spec."""
    for name, tensor in dense:
        if not is_module_name(name) or name.removesuffix(".weight") in quantization.matrices:
            raise CheckpointError(f"{name!r} cannot be the name of an unquantized parameter")
        shards.add(name, _to_half(name, tensor))
    missing = dict(quantization.matrices)
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for name, weight in weights:
        matrix = missing.pop(name, None)
        if matrix is None:
            raise CheckpointError(f"matrix {name!r} is not in the spec, or was given twice")
        if matrix.layout != weight.layout:
            raise CheckpointError(f"matrix {name}: its layout is not the one in the spec")
        for tensor_name, tensor in _matrix_parts(name, matrix, weight, shared):
            shards.add(tensor_name, tensor)
    if missing:
        raise CheckpointError("matrices of the spec were not given", sorted(missing))


def _matrix_parts(
    name: str, matrix: MatrixSpec, weight: VQWeight, shared: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one matrix by name, a shared codebook the first time it is met."""
    parts: dict[str, Tensor] = {f"{name}.scales": weight.scales}
    if weight.permutation is not None:
        dtype = torch.int16 if weight.layout.channel_bits == 16 else torch.int32
        parts[f"{name}.permutation"] = weight.permutation.to(dtype)
    for b, names in enumerate(matrix.codebooks):
        for s, shared_name in enumerate(names):
            pair = (weight.codebooks[b][s].cpu(), weight.codebook_scales[b][s].cpu())
            parts[f"{name}.codes.{b}.{s}"] = weight.codes[b][s]
            parts[f"{name}.codebook.{b}.{s}"], parts[f"{name}.codebook_scale.{b}.{s}"] = pair
            if shared_name is None:
                continue
            if shared_name not in shared:
                shared[shared_name] = pair
                tensor_names = [t for t, _ in codebook_tensors(shared_name, tuple(pair[0].shape))]
                yield from zip(tensor_names, pair, strict=True)
            elif not all(torch.equal(a, b) for a, b in zip(shared[shared_name], pair, strict=True)):
                raise CheckpointError(
                    f"matrix {name}: its codebook {b}.{s} is not {CODEBOOK_PREFIX}.{shared_name}, "
                    "which another matrix gave"
                )
    for tensor_name, _ in matrix_tensors(name, matrix):
        tensor = parts[tensor_name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{tensor_name} holds a number that is not finite")
        yield tensor_name, tensor


def _to_half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is {tensor.dtype}; unquantized parameters are floats")
    half = tensor.detach().to(device="cpu", dtype=torch.float16)
    if not bool(torch.isfinite(half).all()):
        largest = tensor.detach().abs().max().item()
        raise CheckpointError(f"{name} does not fit float16 (largest magnitude {largest:g})")
    return half


def _config_bytes(config: Mapping[str, Any], quantization: QuantizationSpec) -> bytes:
    """Return config.json with the spec in it, bits a weight counted."""
    earlier = config.get("quantization_config")
    if earlier is not None:
        raise CheckpointError(
            "the source's config.json already has a quantization_config: quantize the original"
        )
    if not quantization.matrices:
        raise CheckpointError("there is no quantized matrix; an MGVQ checkpoint needs one")
    target = {k: v for k, v in quantization.bits_per_weight.items() if k == "target"}
    bits = target | counted_bits_per_weight(quantization.matrices)
    counted = dataclasses.replace(quantization, bits_per_weight=bits)
    data = to_json_bytes({**config, "quantization_config": counted.to_json()})
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"config.json would have {len(data)} bytes, at most {MAX_JSON_BYTES} are read: make "
            "the bands wider or record less in the recipe"
        )
    return data


def _gather_files(copy_files: Sequence[Path], extra: Mapping[str, bytes]) -> dict[str, bytes]:
    """Read what travels along; refuse names that are ours, twice given or could be executed."""
    files: dict[str, bytes] = {}
    reserved = (CONFIG_NAME, MANIFEST_NAME, ShardWriter.INDEX_NAME)
    sources: list[tuple[str, Path | bytes]] = [(path.name, path) for path in copy_files]
    for name, source in [*sources, *extra.items()]:
        if not is_file_name(name) or name in reserved or name in files:
            raise CheckpointError(f"{name!r} cannot travel along: the name is taken or not plain")
        if Path(name).suffix not in ALLOWED_SUFFIXES:
            raise CheckpointError(
                f"{name!r} cannot travel along; allowed endings: {', '.join(ALLOWED_SUFFIXES[1:])}"
            )
        try:
            files[name] = source.read_bytes() if isinstance(source, Path) else source
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
    return files


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty: choose another folder, or ask to overwrite")
    if not (target / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{target} is no MGVQ checkpoint, so it is not overwritten")


def _publish(partial: Path, target: Path) -> None:
    """Rename the finished folder into place; a checkpoint that is there moves aside first."""
    aside = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    replaces = target.exists() and any(target.iterdir())
    if replaces:
        target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
