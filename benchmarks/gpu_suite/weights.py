"""Random quantized matrices and their float64 decoding (called by the steps and the tuner).

The decoding reads as the format's definition does and shares no code with the kernels' reference.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from mgvq_kernels.layout import Band, PackedVQ, Stage, VQLayout, VQWeight
from mgvq_kernels.packing import pack

MIXED = VQLayout(
    out_features=150,
    in_features=424,
    bands=(
        Band(0, 32, (Stage(1),)),
        Band(32, 160, (Stage(4), Stage(8))),
        Band(192, 96, (Stage(2),)),
        Band(288, 136, (Stage(8), Stage(8), Stage(4))),
    ),
    has_permutation=True,
)
"""Every vector dimension, one to three stages, a ragged last band, ragged tiles, a permutation."""

TINY = VQLayout(
    out_features=20,
    in_features=136,
    bands=(Band(0, 32, (Stage(4), Stage(8))), Band(32, 64, (Stage(2),)), Band(96, 40, (Stage(1),))),
    has_permutation=True,
)
"""The same for the interpreter."""


def random_weight(layout: VQLayout, seed: int = 0, device: torch.device | str = "cpu") -> VQWeight:
    """Make a matrix with random codes, codebooks, scales and permutation on a device."""
    generator = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype, device=device)

    order = torch.argsort(torch.rand(layout.in_features, generator=generator, device=device))
    return VQWeight(
        layout,
        codes=tuple(
            tuple(
                integers(0, 256, *layout.code_shape(b, s), dtype=torch.uint8)
                for s in range(len(band.stages))
            )
            for b, band in enumerate(layout.bands)
        ),
        codebooks=tuple(
            tuple(integers(-127, 128, 256, s.vector_dim, dtype=torch.int8) for s in band.stages)
            for band in layout.bands
        ),
        codebook_scales=tuple(
            tuple(torch.tensor(0.01 / (s + 1), device=device) for s in range(len(band.stages)))
            for band in layout.bands
        ),
        scales=torch.rand(layout.out_features, generator=generator, device=device).half() + 0.5,
        permutation=order.int() if layout.has_permutation else None,
    )


def decode(weight: VQWeight) -> torch.Tensor:
    """Decode a matrix entry by entry in float64, on the CPU: `[O, I]`."""
    layout = weight.layout
    permuted = np.zeros((layout.out_features, layout.in_features))
    for b, band in enumerate(layout.bands):
        local = np.arange(band.width)
        for s, stage in enumerate(band.stages):
            codes, book = weight.codes[b][s].cpu().numpy(), weight.codebooks[b][s].cpu().numpy()
            scale = weight.codebook_scales[b][s].item()
            entries = book[codes[:, local // stage.vector_dim], local % stage.vector_dim]
            permuted[:, band.start : band.start + band.width] += scale * entries
    dense = permuted
    if weight.permutation is not None:
        dense = np.empty_like(permuted)
        dense[:, weight.permutation.cpu().numpy()] = permuted
    return torch.from_numpy(dense * weight.scales.cpu().double().numpy()[:, None])


def packed_copies(layout: VQLayout, count: int, device: torch.device) -> list[PackedVQ]:
    """Pack one matrix for Triton and copy it, so that copies can be read in turns."""
    first = pack(random_weight(layout, device=device), "triton", device)
    copies = [first]
    for _ in range(count - 1):
        tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
        copies.append(dataclasses.replace(first, tensors=tensors))
    return copies
