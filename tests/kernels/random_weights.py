"""Random quantized matrices, and the decoder in plain Python they are judged by (used by tests)."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu_suite.weights import MIXED as MIXED
from mgvq_kernels.layout import VQLayout, VQWeight


def random_weight(layout: VQLayout, seed: int = 0) -> VQWeight:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    return VQWeight(
        layout,
        codes=tuple(
            tuple(
                integers(0, 256, layout.code_shape(b, s), torch.uint8)
                for s in range(len(band.stages))
            )
            for b, band in enumerate(layout.bands)
        ),
        codebooks=tuple(
            tuple(
                integers(-127, 128, (s.codebook_size, s.vector_dim), torch.int8)
                for s in band.stages
            )
            for band in layout.bands
        ),
        codebook_scales=tuple(
            tuple(torch.rand((), generator=generator) for _ in band.stages) for band in layout.bands
        ),
        scales=torch.rand(layout.out_features, generator=generator).half() + 0.5,
        permutation=torch.randperm(layout.in_features, generator=generator).int()
        if layout.has_permutation
        else None,
    )


def oracle(weight: VQWeight) -> np.ndarray:
    """Decode entry by entry, as the format's definition reads: `[O, I]` float64."""
    layout = weight.layout
    dense = np.zeros((layout.out_features, layout.in_features))
    order = range(layout.in_features) if weight.permutation is None else weight.permutation.tolist()
    for b, band in enumerate(layout.bands):
        for s, stage in enumerate(band.stages):
            codes = weight.codes[b][s].tolist()
            if stage.codec == "trellis":
                codes = stream_windows(codes, stage.rate, stage.window)
            book = weight.codebooks[b][s].double().tolist()
            scale = weight.codebook_scales[b][s].item()
            for o in range(layout.out_features):
                for j in range(band.width):
                    entry = book[codes[o][j // stage.vector_dim]][j % stage.vector_dim]
                    dense[o, order[band.start + j]] += scale * entry
    return dense * weight.scales.double().numpy()[:, None]


def stream_windows(codes: list[list[int]], rate: int, window: int) -> list[list[int]]:
    """Read the entries of a trellis off its codes, one bit of one stream at a time."""
    rows, groups = len(codes), len(codes[0]) // rate
    entries: list[list[int]] = [[] for _ in range(rows)]
    segments = max(1, rows // 256)
    for s in range(segments):
        first, end = 256 * s, rows if s == segments - 1 else 256 * (s + 1)
        for g in range(groups):
            stream = [
                byte >> (7 - bit) & 1
                for row in codes[first:end]
                for byte in row[g * rate : (g + 1) * rate]
                for bit in range(8)
            ]
            for r in range(first, end):
                for i in range(8):
                    last = (r - first) * 8 * rate + rate * (i + 1)
                    bits = [stream[j % len(stream)] for j in range(last - window, last)]
                    entries[r].append(int("".join(map(str, bits)), 2))
    return entries
