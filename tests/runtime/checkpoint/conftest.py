"""What the checkpoint tests share: random matrices, and a small checkpoint in several shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mgvq_kernels.layout import Band, Stage, VQLayout, VQWeight
from mgvq_runtime.checkpoint import writer
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec

LAYOUTS = {
    "model.layers.0.self_attn.qkv_proj": VQLayout(
        12, 72, (Band(0, 32, (Stage(4),)), Band(32, 40, (Stage(4), Stage(8)))), True
    ),
    "model.layers.0.mlp.down_proj": VQLayout.uniform(8, 24, 1),
    "model.embed_tokens": VQLayout.uniform(33, 16, 4),
    "visual.blocks.0.mlp.fc1": VQLayout.uniform(6, 8, 8, has_permutation=True),
}
SHARED = {
    "model.layers.0.mlp.down_proj": ((("coarse",),)),
    "model.layers.0.self_attn.qkv_proj": ((None,), (None, "coarse")),
}


def random_weight(layout: VQLayout, seed: int, shared: dict[str, Any]) -> VQWeight:
    """Draw a weight; `shared` maps (band, stage) to the codebook and scale it must use."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=draw).to(dtype)

    codes, books, scales = [], [], []
    for b, band in enumerate(layout.bands):
        stages = range(len(band.stages))
        codes.append(tuple(integers(0, 256, layout.code_shape(b, s), torch.uint8) for s in stages))
        pairs = [
            shared.get((b, s))
            or (
                integers(-128, 128, (256, stage.vector_dim), torch.int8),
                torch.rand((), generator=draw) + 0.01,
            )
            for s, stage in enumerate(band.stages)
        ]
        books.append(tuple(book for book, _ in pairs))
        scales.append(tuple(scale for _, scale in pairs))
    permutation = torch.randperm(layout.in_features, generator=draw).to(torch.int32)
    return VQWeight(
        layout,
        tuple(codes),
        tuple(books),
        tuple(scales),
        torch.rand(layout.out_features, generator=draw).to(torch.float16),
        permutation if layout.has_permutation else None,
    )


def arguments(seed: int = 0) -> dict[str, Any]:
    """Return arguments of `write_checkpoint`, but for the folder."""
    draw = torch.Generator().manual_seed(seed + 100)
    coarse = (
        torch.randint(-128, 128, (256, 8), generator=draw).to(torch.int8),
        torch.rand((), generator=draw),
    )
    weights = []
    for i, (name, layout) in enumerate(LAYOUTS.items()):
        shared = {
            (b, s): coarse
            for b, names in enumerate(SHARED.get(name, ()))
            for s, shared_name in enumerate(names)
            if shared_name
        }
        weights.append((name, random_weight(layout, seed + i, shared)))
    spec = QuantizationSpec(
        {name: MatrixSpec(layout, SHARED.get(name, ())) for name, layout in LAYOUTS.items()},
        {"target": 2.0},
        {"method": "test"},
    )
    dense = {
        "model.layers.0.self_attn.qkv_proj.bias": torch.randn(12, generator=draw),
        "model.layers.0.input_layernorm.weight": torch.randn(16, generator=draw),
        "model.norm.weight": torch.randn(16, generator=draw),
    }
    return {
        "config": {"model_type": "test", "hidden_size": 16},
        "quantization": spec,
        "dense": list(dense.items()),
        "weights": weights,
        "extra_files": {
            "tokenizer.json": b'{"version": "1.0"}',
            "chat_template.jinja": b"{{ messages[0].content }}",
        },
    }


def read_all(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read every tensor, as a loader would."""
    return dict(checkpoint.tensors()) | dict(checkpoint.vq_weights())


def flat(weight: VQWeight) -> list[Tensor]:
    """Return all tensors of a weight, for comparisons."""
    nested = (*weight.codes, *weight.codebooks, *weight.codebook_scales)
    tensors = [tensor for stages in nested for tensor in stages] + [weight.scales]
    return tensors + ([] if weight.permutation is None else [weight.permutation])


@pytest.fixture
def checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in three shards, to be damaged."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    return writer.write_checkpoint(tmp_path / "checkpoint", **arguments())


@pytest.fixture
def make_arguments() -> Callable[..., dict[str, Any]]:
    """The function that makes `write_checkpoint`'s arguments from a seed."""
    return arguments
