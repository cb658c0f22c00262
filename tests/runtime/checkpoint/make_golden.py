"""The golden checkpoints: small matrices, fp16 vectors, every kind of tensor the format has.

`python -m tests.runtime.checkpoint.make_golden VERSION FOLDER` writes one; `golden/v1` is what
version 1 of the format wrote, and must be read by every later version; `golden/v2` likewise. Never
regenerate an old one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels.layout import Band, Stage, VQLayout, VQWeight, rate_stages
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "v1"
GOLDEN_TRELLIS = Path(__file__).parent / "golden" / "v2"
CONFIG = {"architectures": ["ExampleModel"], "model_type": "example", "hidden_size": 8}
EXTRA_FILES = {"generation_config.json": b'{"eos_token_id": 2}\n'}


def digit_codebook() -> tuple[Tensor, Tensor]:
    """Entry k holds the four base-4 digits of k, lowest first, each minus 2; the scale is 0.5."""
    k = torch.arange(256)
    digits = torch.stack([(k >> (2 * i)) & 3 for i in range(4)], dim=1) - 2  # [256, 4]
    return digits.to(torch.int8), torch.tensor(0.5)


def ramp_codebook(vector_dim: int, entries: int = 256) -> tuple[Tensor, Tensor]:
    """Entry k, element i is (7k + 13i) mod 256 - 128; the scale is 1/64."""
    k = torch.arange(entries)[:, None]
    i = torch.arange(vector_dim)[None, :]
    return ((7 * k + 13 * i) % 256 - 128).to(torch.int8), torch.tensor(1 / 64)


def worked_example() -> VQWeight:
    """The 4 x 8 matrix of docs/checkpoint_format.md: one band, one stage, a permutation."""
    book, scale = digit_codebook()
    return VQWeight(
        layout=VQLayout(4, 8, (Band(0, 8, (Stage(4),)),), has_permutation=True),
        codes=((torch.tensor([[27, 228], [0, 255], [170, 85], [1, 64]], dtype=torch.uint8),),),
        codebooks=((book,),),
        codebook_scales=((scale,),),
        scales=torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float16),
        permutation=torch.tensor([1, 0, 3, 2, 5, 4, 7, 6], dtype=torch.int32),
    )


def two_stage_matrix() -> VQWeight:
    """A 16 x 32 matrix of 3 bits: a shared codebook, then one of its own."""
    rows = torch.arange(16)[:, None]
    book, scale = digit_codebook()
    own_book, own_scale = ramp_codebook(8)
    return VQWeight(
        layout=VQLayout(16, 32, (Band(0, 32, (Stage(4), Stage(8))),)),
        codes=(
            (
                ((31 * rows + 17 * torch.arange(8)) % 256).to(torch.uint8),
                ((5 * rows + 3 * torch.arange(4)) % 256).to(torch.uint8),
            ),
        ),
        codebooks=((book, own_book),),
        codebook_scales=((scale, own_scale),),
        scales=(torch.arange(1, 17) / 8).to(torch.float16),
    )


def contents() -> dict[str, Any]:
    """Return the arguments of `write_checkpoint`, but for the folder."""
    weights = {"model.layers.0.mlp.down_proj": worked_example(), "lm_head": two_stage_matrix()}
    shared = {"model.layers.0.mlp.down_proj": ((("digits",),)), "lm_head": ((("digits", None),))}
    spec = QuantizationSpec(
        matrices={n: MatrixSpec(w.layout, shared[n]) for n, w in weights.items()},
        bits_per_weight={"target": 2.0},
        recipe={"bits": 2.0},
        calibration={"samples": 0},
        tool_version="0.1.0",
        source_fingerprint="xxh3-128:" + "0" * 32,
    )
    dense = {
        "model.layers.0.mlp.down_proj.bias": torch.tensor([0.5, -0.25, 0.0, 1.0]),
        "model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
    }
    return {
        "config": CONFIG,
        "quantization": spec,
        "dense": list(dense.items()),
        "weights": list(weights.items()),
        "extra_files": EXTRA_FILES,
    }


def trellis_matrix() -> VQWeight:
    """A 4 x 8 matrix of 2 bits: four rows of one group, its own table of 4096 entries."""
    book, scale = ramp_codebook(1, 4096)
    return VQWeight(
        layout=VQLayout.uniform(4, 8, 2, has_permutation=True, codec="trellis"),
        codes=((torch.tensor([[27, 228], [0, 255], [170, 85], [1, 64]], dtype=torch.uint8),),),
        codebooks=((book,),),
        codebook_scales=((scale,),),
        scales=torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float16),
        permutation=torch.tensor([1, 0, 3, 2, 5, 4, 7, 6], dtype=torch.int32),
    )


def two_rate_matrix() -> VQWeight:
    """A 16 x 40 matrix of 1 and 3 bits, whose bands share a table of 256 entries."""
    rows = torch.arange(16)[:, None]
    pair = ramp_codebook(1)
    bands = (
        Band(0, 32, rate_stages(1, "trellis", 8)),
        Band(32, 8, rate_stages(3, "trellis", 8)),
    )
    return VQWeight(
        layout=VQLayout(16, 40, bands),
        codes=(
            (((31 * rows + 17 * torch.arange(4)) % 256).to(torch.uint8),),
            (((5 * rows + 3 * torch.arange(3)) % 256).to(torch.uint8),),
        ),
        codebooks=((pair[0],), (pair[0],)),
        codebook_scales=((pair[1],), (pair[1],)),
        scales=(torch.arange(1, 17) / 8).to(torch.float16),
    )


def trellis_contents() -> dict[str, Any]:
    """Return the arguments of `write_checkpoint` for version 2, but for the folder."""
    weights = {
        "model.layers.0.mlp.down_proj": trellis_matrix(),
        "lm_head": two_stage_matrix(),
        "model.embed_tokens": two_rate_matrix(),
    }
    shared = {"model.embed_tokens": (("ramp",), ("ramp",))}
    given = contents()
    spec = QuantizationSpec(
        matrices={n: MatrixSpec(w.layout, shared.get(n, ())) for n, w in weights.items()},
        tool_version="0.2.0",
    )
    return given | {"quantization": spec, "weights": list(weights.items())}


if __name__ == "__main__":
    written = {"1": contents, "2": trellis_contents}[sys.argv[1]]()
    print(write_checkpoint(sys.argv[2], **written))
