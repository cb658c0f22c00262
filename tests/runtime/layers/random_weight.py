"""Random quantized weights, for tests that need a quantized model and not a good one."""

from __future__ import annotations

import torch

from mgvq_kernels.layout import VQLayout, VQWeight


def random_weight(layout: VQLayout, seed: int) -> VQWeight:
    """Return a seeded weight of about unit output variance."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    codes, books, scales = [], [], []
    for b, band in enumerate(layout.bands):
        stages = range(len(band.stages))
        shapes = [layout.code_shape(b, s) for s in stages]
        codes.append(tuple(integers(0, 256, shape, torch.uint8) for shape in shapes))
        sizes = [(stage.codebook_size, stage.vector_dim) for stage in band.stages]
        books.append(tuple(integers(-127, 128, size, torch.int8) for size in sizes))
        scales.append(tuple(torch.tensor(1 / 73, dtype=torch.float32) for _ in stages))
    rows = 0.5 + torch.rand(layout.out_features, generator=generator)
    permutation = torch.randperm(layout.in_features, generator=generator).to(torch.int32)
    return VQWeight(
        layout,
        tuple(codes),
        tuple(books),
        tuple(scales),
        (rows * layout.in_features**-0.5).to(torch.float16),
        permutation if layout.has_permutation else None,
    )
