"""Random quantized matrices and their float64 decoding (called by the steps and the tuner).

The decoding reads as the format's definition does and shares no code with the kernels' reference.
"""

from __future__ import annotations

import dataclasses
import itertools

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


def _trellis(rate: int, window: int = 12) -> tuple[Stage, ...]:
    return (Stage(1, "trellis", rate, window),)


TRELLIS_MIXED = VQLayout(
    out_features=600,
    in_features=424,
    bands=(
        Band(0, 32, _trellis(1)),
        Band(32, 160, _trellis(3, 10)),
        Band(192, 32, _trellis(4)),
        Band(224, 64, _trellis(5)),
        Band(288, 136, _trellis(2, 8)),
    ),
    has_permutation=True,
)
"""Every rate, shorter windows, two segments, ragged tiles and blocks, a permutation."""

TRELLIS_TINY = VQLayout(
    out_features=20,
    in_features=72,
    bands=(Band(0, 32, _trellis(3)), Band(32, 40, _trellis(1, 9))),
    has_permutation=True,
)
"""A trellis for the interpreter."""


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
            tuple(
                integers(-127, 128, s.codebook_size, s.vector_dim, dtype=torch.int8)
                for s in band.stages
            )
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
            if stage.codec == "trellis":
                codes = stream_entries(codes, stage.rate, stage.window)
            entries = book[codes[:, local // stage.vector_dim], local % stage.vector_dim]
            permuted[:, band.start : band.start + band.width] += scale * entries
    dense = permuted
    if weight.permutation is not None:
        dense = np.empty_like(permuted)
        dense[:, weight.permutation.cpu().numpy()] = permuted
    return torch.from_numpy(dense * weight.scales.cpu().double().numpy()[:, None])


def stream_entries(codes: np.ndarray, rate: int, window: int) -> np.ndarray:
    """Read a trellis bit by bit: the codebook entry of every weight, `[O, width]`.

    Args:
        codes: `[O, width * rate / 8]` uint8.
        rate: bits a weight.
        window: bits of an entry's number.
    """
    rows = codes.shape[0]
    cuts = [256 * s for s in range(max(1, rows // 256))] + [rows]
    parts = []
    for first, end in itertools.pairwise(cuts):
        cut = codes[first:end].reshape(end - first, -1, rate).transpose(1, 0, 2)
        bits = np.unpackbits(cut.reshape(cut.shape[0], -1), axis=1)  # [groups, bits of the segment]
        ends = np.arange(rate, bits.shape[1] + 1, rate)
        entries = np.zeros((cut.shape[0], ends.size), dtype=np.int64)
        for back in range(window, 0, -1):
            entries = entries * 2 + bits[:, (ends - back) % bits.shape[1]]
        parts.append(
            entries.reshape(-1, end - first, 8).transpose(1, 0, 2).reshape(end - first, -1)
        )
    return np.concatenate(parts)


def packed_copies(layout: VQLayout, count: int, device: torch.device) -> list[PackedVQ]:
    """Pack one matrix for Triton and copy it, so that copies can be read in turns."""
    first = pack(random_weight(layout, device=device), "triton", device)
    copies = [first]
    for _ in range(count - 1):
        tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
        copies.append(dataclasses.replace(first, tensors=tensors))
    return copies
