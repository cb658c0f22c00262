"""Matrices, codes and activations at the edges, and the bound their products keep (used by tests).

Both the compiled CPU kernels and the interpreted GPU kernels draw from here. The truth is numpy's:
codes indexed, float64.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import strategies as st

from mgvq_kernels import trellis
from mgvq_kernels.layout import Band, PackedVQ, Stage, VQLayout, VQWeight
from tests.kernels.random_weights import random_weight

ROWS = (1, 15, 16, 17, 255, 256, 257)
"""Output rows at the borders of atoms, strips and tiles."""

CHANNELS = (128, 256, 384, 1536)

TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 63, 64, 65, 128, 129)
"""Rows of x at the borders of code paths and of tiles."""

FOUR_KINDS = ((Stage(4),), (Stage(8),), (Stage(4), Stage(8)), (Stage(1),))

SINGLE = {"1 bit": (Stage(8),), "outliers": (Stage(1),), "two across": (Stage(8), Stage(8))}
"""Stages of the single bands that have other ones than 2 bits' own."""

KINDS = ("1 bit", "2 bits", "two across", "outliers", "one block", "interleaved")
"""Single bands, a band of one block of 32 groups before another, four kinds of band in turns."""

CODES = {
    "random": None,
    "zero": lambda places: places * 0,
    "last": lambda places: places * 0 + 255,
    "arange": lambda places: places % 256,
    "one bank": lambda places: places * 32 % 256,
}

VALUES = {"zero": 0.0, "6e4": 6e4, "-6e4": -6e4, "subnormal": 1e-7}
X = ("normal", "one-hot", "alternating", *VALUES)


def edge_layout(out_features: int, in_features: int, kind: str) -> VQLayout:
    """Cut a matrix in one of the ways of `KINDS`; its channels are permuted."""
    bands = [(in_features, SINGLE.get(kind, (Stage(4),)))]
    if kind == "one block" and in_features > 128:
        bands = [(128, (Stage(4),)), (in_features - 128, (Stage(8),))]
    if kind == "interleaved":
        width = 32 if in_features <= 1024 else 128
        bands = [(width, FOUR_KINDS[i % 4]) for i in range(in_features // width)]
    starts = np.cumsum([0] + [width for width, _ in bands]).tolist()
    return VQLayout(
        out_features,
        in_features,
        tuple(Band(start, *band) for start, band in zip(starts, bands, strict=False)),
        has_permutation=True,
    )


def edge_weight(layout: VQLayout, codes: str) -> VQWeight:
    """Make a random matrix whose codes follow one of the patterns of `CODES`."""
    weight = random_weight(layout, layout.out_features)
    pattern = CODES[codes]
    for stage in (stage for stages in weight.codes for stage in stages):
        if pattern is not None:
            stage.copy_(pattern(torch.arange(stage.numel()).view_as(stage)))
    return weight


def edge_x(tokens: int, in_features: int, kind: str) -> torch.Tensor:
    """Make activations `[tokens, I]` float16 of one of the kinds of `X`."""
    if kind in VALUES:
        return torch.full((tokens, in_features), VALUES[kind]).half()
    if kind == "one-hot":
        return torch.eye(in_features)[(torch.arange(tokens) * 37 + 5) % in_features].half()
    if kind == "alternating":
        return torch.tensor([1.0, -1.0]).repeat(tokens, in_features // 2).half()
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).half()


weights = st.builds(
    edge_weight,
    st.builds(
        edge_layout, st.sampled_from(ROWS), st.sampled_from(CHANNELS), st.sampled_from(KINDS)
    ),
    st.sampled_from(sorted(CODES)),
)


def decoded(weight: VQWeight, *, magnitudes: bool = False) -> np.ndarray:
    """Decode as `random_weights.oracle` does, by numpy's indexing: `[O, I]` float64.

    With `magnitudes` no sign counts: what a kernel adds up, stage by stage, before it cancels.
    """
    layout = weight.layout
    dense = np.zeros((layout.out_features, layout.in_features))
    for b, band in enumerate(layout.bands):
        for stage, codes, book, scale in zip(
            band.stages,
            weight.codes[b],
            weight.codebooks[b],
            weight.codebook_scales[b],
            strict=True,
        ):
            if stage.codec == "trellis":
                codes = trellis.windows(codes, stage.rate, stage.window)
            vectors = book.double().numpy()[codes.numpy()]  # [O, width/d, d]
            values = scale.item() * vectors.reshape(layout.out_features, band.width)
            columns = slice(band.start, band.start + band.width)
            dense[:, columns] += np.abs(values) if magnitudes else values
    if weight.permutation is not None:
        dense = dense[:, np.argsort(weight.permutation.numpy())]
    return dense * weight.scales.double().numpy()[:, None]


def assert_product(
    y: torch.Tensor, x: torch.Tensor, weight: VQWeight, loss: float = 2e-6, steps: int = 0
) -> None:
    """Ask for `x @ W.T` to `loss` of the same sum without signs, and to y's rounding, one by one.

    So sums that cancel, stages of one weight among them, are judged by what cancelled. Equal terms
    may be rounded the same way each time: on top comes the bound of float32 sums in any order. With
    `steps`, each code may also be off by half a step of so many in the largest partial sum there
    is.
    """
    wide, dense = x.double().numpy(), decoded(weight)
    truth = wide @ dense.T
    terms = weight.layout.in_features
    slack = (loss + terms * 2**-24) * (np.abs(wide) @ decoded(weight, magnitudes=True).T)
    if steps:
        entry = sum(
            float(book.abs().max()) * float(scale)
            for books, scales in zip(weight.codebooks, weight.codebook_scales, strict=True)
            for book, scale in zip(books, scales, strict=True)
        )
        largest = np.count_nonzero(wide, axis=1) * np.abs(wide).max(axis=1) * entry
        slack += largest[:, None] * float(weight.scales.max()) / (2 * steps)
    limits = torch.finfo(y.dtype)
    got = y.double().numpy()
    held = np.abs(truth) + slack < limits.max
    allowed = slack + limits.eps * np.abs(truth) + limits.tiny
    assert (np.abs(got - truth)[held] <= allowed[held]).all()
    assert np.isinf(got[np.abs(truth) - slack > limits.max * (1 + limits.eps)]).all()


def between_guards(packed: PackedVQ) -> tuple[PackedVQ, list[torch.Tensor]]:
    """Copy a packed weight so that 0xFF bytes follow and precede every tensor; return them too."""
    tensors, guards = {}, []
    for name, tensor in packed.tensors.items():
        if name != "descriptor":
            room = torch.full((tensor.nbytes + 128,), 255, dtype=torch.uint8)
            first = -room.data_ptr() % 64 + (0 if room.data_ptr() % 64 else 64)
            inner = room[first : first + tensor.nbytes]
            inner.copy_(tensor.contiguous().view(-1).view(torch.uint8))
            tensors[name] = inner.view(tensor.dtype).view(tensor.shape)
            guards += [room[:first], room[first + tensor.nbytes :]]
    return dataclasses.replace(packed, tensors=tensors), guards
