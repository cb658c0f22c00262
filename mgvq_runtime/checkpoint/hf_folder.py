"""The safetensors of an unquantized Hugging Face folder (called by the reader).

Finds the files (one, or shards with an index), refuses pickles, and gives each of our parameters
its shape and the tensors it is made of. What the names mean is in `hf_names.py`. No tensor is read.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgvq_runtime.checkpoint.files import is_file_name, read_json
from mgvq_runtime.checkpoint.hf_names import Source, map_names
from mgvq_runtime.checkpoint.name_rules import Change
from mgvq_runtime.checkpoint.tensor_file import Place, TensorFile, open_tensor_file
from mgvq_runtime.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
OTHER_LAYOUT = "consolidated*"
"""Files in which Mistral's and Meta's folders hold the weights once more, in another layout."""
FLOAT_WORDS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    """Stacked along the rows, then given the shape."""
    row_groups: tuple[int, int] | None = None
    """Where rows lie by key/value head: how many there are, and query heads of each."""


def open_files(folder: Path) -> dict[str, TensorFile]:
    """Open every safetensors file of a folder; those of `OTHER_LAYOUT` are left alone.

    Args:
        folder: with `model.safetensors`, or shards and `model.safetensors.index.json`.

    Returns:
        The file each tensor lies in, by tensor name.

    Raises:
        CheckpointError: if there is none (for pickles, with the command that converts them), or if
            index and shards disagree; every problem is listed.
    """
    present = {p.name for p in folder.glob("*.safetensors")}
    weight_map = _read_index(folder) if (folder / INDEX_NAME).exists() else None
    wanted = {SINGLE_NAME} if weight_map is None else set(weight_map.values())
    present -= {p.name for p in folder.glob(f"{OTHER_LAYOUT}.safetensors")} - wanted
    if weight_map is None and not present:
        raise CheckpointError(_nothing_to_read(folder))
    problems = [f"{name} is missing: copy it again" for name in sorted(wanted - present)]
    said_by = SINGLE_NAME if weight_map is None else INDEX_NAME
    problems += [
        f"{name} does not belong to {said_by}: remove it" for name in sorted(present - wanted)
    ]
    files: dict[str, TensorFile] = {}
    for name in sorted(wanted & present):
        try:
            file = open_tensor_file(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for tensor in file.places:
            if tensor in files:
                problems.append(f"{tensor} is in {files[tensor].path.name} and in {name}")
            elif weight_map is not None and weight_map.get(tensor) != name:
                problems.append(f"{tensor} is in {name}, the index says {weight_map.get(tensor)}")
            files[tensor] = file
    if not problems:
        problems += [
            f"{tensor} is in no shard" for tensor in weight_map or () if tensor not in files
        ]
    if problems:
        raise CheckpointError(f"{folder} is not complete", problems)
    return files


def parameters(
    folder: Path, files: Mapping[str, TensorFile], config: Mapping[str, Any]
) -> dict[str, Parameter]:
    """Map the tensors of a folder to our parameters.

    Args:
        folder: named in errors.
        files: the file each tensor lies in.
        config: the folder's config.json, for the number of heads.

    Returns:
        Shape, dtype and source tensors of every parameter, by our name.

    Raises:
        CheckpointError: if a name is unknown, a tensor missing or its shape or dtype impossible.
    """
    try:
        sources = map_names(files.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    result: dict[str, Parameter] = {}
    problems: list[str] = []
    for name, source in sources.items():
        places = [files[part].places[part] for part in source.parts]
        try:
            shape = _shape(source, places)
        except CheckpointError as error:
            problems.append(f"{' + '.join(source.parts)}: {error}")
            continue
        groups = None
        if source.change is Change.HEADS_SORTED:
            groups = _row_groups(config)
            if shape[0] % (groups[0] * (groups[1] + 2)):
                problems.append(f"{source.parts[0]}: {shape[0]} rows are not whole heads")
        result[name] = Parameter(shape, places[0].dtype, source.parts, groups)
    if problems:
        raise CheckpointError(f"{folder} holds tensors that cannot be used", problems)
    return result


def _shape(source: Source, places: list[Place]) -> tuple[int, ...]:
    """Return the shape after stacking and flattening, or say why there is none."""
    specs = [place.spec for place in places]
    if specs[0].dtype not in FLOAT_WORDS or any(s.dtype != specs[0].dtype for s in specs):
        found = ", ".join(s.dtype for s in specs)
        raise CheckpointError(f"dtype is {found}; expected one of {', '.join(FLOAT_WORDS)}")
    shape = specs[0].shape
    if any(not s.shape or s.shape[1:] != shape[1:] for s in specs) or math.prod(shape) == 0:
        found = ", ".join(str(list(s.shape)) for s in specs)
        raise CheckpointError(f"shapes {found} cannot be stacked along the rows")
    if source.change is Change.FLATTENED:
        if len(shape) not in (4, 5):
            raise CheckpointError(f"expected a convolution [E, C, ...], got {list(shape)}")
        return (shape[0], math.prod(shape[1:]))
    if source.change is Change.SQUEEZED:
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        return shape
    if len(shape) > 2:
        raise CheckpointError(f"expected a vector or a matrix, got {list(shape)}")
    return (sum(s.shape[0] for s in specs), *shape[1:])


def _row_groups(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return key/value heads, and query heads of each, as config.json says them."""
    nested = next((config[k] for k in ("llm_config", "text_config") if k in config), config)
    heads = nested.get("num_attention_heads") if isinstance(nested, Mapping) else None
    groups = nested.get("num_key_value_heads") or heads if isinstance(nested, Mapping) else None
    if type(heads) is not int or type(groups) is not int or groups < 1 or heads % groups:
        raise CheckpointError(
            f"config.json: num_attention_heads ({heads!r}) and num_key_value_heads ({groups!r}) "
            "must be integers, the second a divisor of the first, to take wqkv apart"
        )
    return groups, heads // groups


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, name in weight_map.items():
        if not is_file_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts {tensor[:200]} into {str(name)[:200]!r}; only the name of a "
                "*.safetensors file in the same folder may stand there"
            )
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.glob("*model*.bin"))
    if pickles:
        return (
            f"{folder} holds its weights in {pickles[0]}, a pickle; pickles can run code and are "
            f"not read. Convert it once: {conversion_command(folder, pickles)}"
        )
    message = f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}"
    others = sorted(
        p.name for end in ("pth", "safetensors") for p in folder.glob(f"{OTHER_LAYOUT}.{end}")
    )
    if others:
        message += (
            f"; {others[0]} is in a layout that is not read: get the files that the model's page "
            "on the hub has for transformers"
        )
    return message


def conversion_command(folder: Path, pickles: Sequence[str]) -> str:
    """Return the command that writes pickles as safetensors, running no code of them.

    Args:
        folder: where they lie, and where the result goes.
        pickles: their names.
    """
    program = (
        "import sys, torch; from safetensors.torch import save_file; tensors = {}; "
        '[tensors.update(torch.load(file, weights_only=True, map_location="cpu")) '
        "for file in sys.argv[2:]]; "
        "save_file({name: tensor.clone() for name, tensor in tensors.items()}, sys.argv[1])"
    )
    files = [str(folder.absolute() / name) for name in (SINGLE_NAME, *pickles)]
    return shlex.join(["python", "-c", program, *files])
