"""From a checkpoint folder to a filled graph (called by `engine`, `mgvq_quantizer` and tests).

Total: every tensor of the checkpoint has its parameter and every parameter its tensor, or one
`CheckpointError` lists everything that does not fit, before a tensor is read. How long the padded
vocabulary is, and whether there is a head, the tensors say, whatever config.json does. The graph is
made on the meta device and filled one tensor at a time, so the peak is the model and its largest
tensor. Bytes and digests are `checkpoint.reader`'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mgvq_kernels.layout import VQLayout
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.checkpoint.row_parts import HEAD, TABLE, row_parts
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.layers.embedding import HostEmbedding, VQEmbedding
from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.layers.vq_matrix import VQMatrix
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.registry import Family, find_family, meta_graph
from mgvq_runtime.tokenizer.folder import added_token_id

INTERNVL2_PLACEHOLDER = "<IMG_CONTEXT>"
"""Stands for a row of a picture; only the tokenizer of a hub's folder knows its id."""
_TOKEN_TABLE, _TIED_HEAD = f"{TABLE}.weight", f"{HEAD}.weight"


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """Load a dense or quantized checkpoint folder.

    Args:
        path: The folder.
        device: Where the weights go.
        dtype: Type of dense weights, norms, biases and activations.

    Returns:
        The filled graph, in eval mode, without gradients.

    Raises:
        CheckpointError: if files, names or shapes do not agree; every problem is listed.
        ConfigError: if config.json cannot be understood or asks for what is not implemented.
    """
    return fill_model(open_checkpoint(path), device, dtype)


def fill_model(
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    table_on_host: bool = False,
    left_out: tuple[str, ...] = (),
) -> CausalLM:
    """Make the graph of an open checkpoint and fill it.

    Args:
        checkpoint: From `open_checkpoint`.
        device: As in `load_model`.
        dtype: As in `load_model`.
        table_on_host: Whether a dense token table, which must not be the head too, stays in main
            memory.
        left_out: What names of parameters begin with that are not read: they stay on the meta
            device, for a caller that fills them when they are needed.

    Raises:
        CheckpointError: if names or shapes do not agree; every problem is listed.
        ConfigError: if config.json cannot be understood or asks for what is not implemented.
    """
    family = find_family(checkpoint.config)
    config = model_config(checkpoint)
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    layouts = {name: matrix.layout for name, matrix in matrices.items()}
    parts = _row_parts(checkpoint)
    if problems := _misfits(family, config, checkpoint, layouts, parts):
        raise CheckpointError(f"{checkpoint.path} does not fit its config.json", problems)
    rows_device = torch.device(device) if table_on_host else None
    model = meta_graph(family, config, LayerFactory(layouts, rows_device, parts))
    for name in checkpoint.dense:
        if name.startswith(left_out) or (name == _TIED_HEAD and config.tie_word_embeddings):
            continue
        place = "cpu" if table_on_host and name == _TOKEN_TABLE else device
        problems += _fill_parameter(model, name, checkpoint.tensor(name), place, dtype)
    if problems:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded", problems)
    for name, weight in checkpoint.vq_weights():
        layer = model.get_submodule(name)
        assert isinstance(layer, VQMatrix), name
        layer.load(weight, device)
    _settle(model, device, dtype)
    table = model.model.embed_tokens
    if isinstance(table, HostEmbedding) and table.rows_device.type == "cuda":
        table.pin()
    return model.eval()


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read config.json, corrected by the tensors.

    A placeholder that it leaves to the tokenizer is looked up there. No tensor is read, unless
    there is a head beside the token table that it is said to be.

    Raises:
        CheckpointError: if such a head or the table is damaged, or a part of them is missing.
        ConfigError: if config.json cannot be understood or asks for what is not implemented.
        TokenizerError: if the file that would name the placeholder is malformed.
    """
    config = find_family(checkpoint.config).config.from_hf(checkpoint.config)
    config = _as_stored(config, checkpoint)
    if config.vision_config is None:
        return config
    image, video = config.image_token_id, config.video_token_id
    if image is None:
        image = added_token_id(checkpoint.path, INTERNVL2_PLACEHOLDER)
    vocab_size = config.text_config.vocab_size
    if image is not None and image >= vocab_size:
        raise ConfigError(
            f"{checkpoint.path}: image_token_id {image} is outside the vocabulary of {vocab_size}: "
            f"config.json, tokenizer and weights are not of one model"
        )
    if video is not None and video >= vocab_size:
        video = None
    return dataclasses.replace(config, image_token_id=image, video_token_id=video)


def _as_stored(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Take the vocabulary's length from the token table, and tie the head if it is that table."""
    shapes, parts = _matrix_shapes(checkpoint), _row_parts(checkpoint)
    text, table = config.text_config, shapes.get(_TOKEN_TABLE, ())
    if (rows := parts.get(TABLE)) is not None:
        text = dataclasses.replace(text, vocab_size=sum(rows))
    elif len(table) == 2 and table[1] == text.hidden_size:
        text = dataclasses.replace(text, vocab_size=table[0])
    has_head = _TIED_HEAD in shapes or HEAD in parts
    is_tied = not has_head or (config.tie_word_embeddings and _repeats_table(checkpoint))
    return dataclasses.replace(config, text_config=text, tie_word_embeddings=is_tied)


def _repeats_table(checkpoint: Checkpoint) -> bool:
    """Return whether the head that is stored is the token table once more.

    Where it is not, config.json is wrong (it may leave out a key that is true by default), and the
    head is used, as transformers 5 does. A quantized one is never the table: the quantizer writes
    none that is.
    """
    table, head = checkpoint.dense.get(_TOKEN_TABLE), checkpoint.dense.get(_TIED_HEAD)
    if table is None or head is None or (table.shape, table.dtype) != (head.shape, head.dtype):
        return False
    return torch.equal(checkpoint.tensor(_TOKEN_TABLE), checkpoint.tensor(_TIED_HEAD))


def _matrix_shapes(checkpoint: Checkpoint) -> dict[str, Sequence[int]]:
    """Return the shape of every parameter, and of every quantized matrix as of its own, by name."""
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    shapes: dict[str, Sequence[int]] = {n: tensor.shape for n, tensor in checkpoint.dense.items()}
    for name, matrix in matrices.items():
        shapes[f"{name}.weight"] = (matrix.layout.out_features, matrix.layout.in_features)
    return shapes


def _row_parts(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Return the rows of each part of table and head where they are in parts, by module name.

    Raises:
        CheckpointError: if a part is missing.
    """
    shapes = {n.removesuffix(".weight"): shape for n, shape in _matrix_shapes(checkpoint).items()}
    try:
        return row_parts(shapes)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _misfits(
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    layouts: Mapping[str, VQLayout],
    parts: Mapping[str, Sequence[int]],
) -> list[str]:
    """List where the checkpoint's names and shapes are not those of the dense graph."""
    dense = meta_graph(family, config, LayerFactory(row_parts=parts))
    expected = {name: tuple(p.shape) for name, p in dense.named_parameters()}
    problems = []
    for name, layout in layouts.items():
        shape = expected.pop(f"{name}.weight", None)
        given = (layout.out_features, layout.in_features)
        if shape is None:
            problems.append(f"{name} is quantized, but this model has no such matrix")
        elif shape != given:
            problems.append(f"{name} is quantized as {list(given)}, expected {list(shape)}")
    for name, tensor in checkpoint.dense.items():
        if name == _TIED_HEAD and config.tie_word_embeddings:
            continue
        shape = expected.pop(name, None)
        if shape is None:
            problems.append(f"{name} is in the checkpoint, but this model has no such parameter")
        elif shape != tuple(tensor.shape):
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"{name} is {tensor.dtype}, expected a floating-point tensor")
    problems += [f"{n} {list(shape)} is not in the checkpoint" for n, shape in expected.items()]
    return problems


def _fill_parameter(
    model: nn.Module, name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype
) -> list[str]:
    """Put one tensor where it belongs; returns what is wrong with its values."""
    owner_name, _, leaf = name.rpartition(".")
    value = tensor.to(device=device, dtype=dtype)
    setattr(model.get_submodule(owner_name), leaf, nn.Parameter(value, requires_grad=False))
    if not value.isfinite().all():
        return [f"{name} has values that are not finite in {dtype}"]
    return []


def _settle(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move what is computed, not loaded, and tell quantized tables the type of their rows."""
    for module in model.modules():
        if isinstance(module, VQEmbedding):
            module.dtype = dtype
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
