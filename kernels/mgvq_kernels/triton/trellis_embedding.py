"""Rows of a table coded as a trellis, decoded (called by `ops.vq_embedding` on a GPU).

Rows come in any order, so every weight loads the two words its window may span. An id outside the
table gives a row of zeros: looking at ids on the host would stall the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.trellis_order import BAND_FIELDS
from mgvq_kernels.triton.trellis_tile import TILE_ROWS, UNIT_ROWS, UNITS

BLOCK_I = 256


@triton.jit
def trellis_embedding_kernel(
    ids_ptr,  # [T] int64
    codes_ptr,  # tiles of int32
    halos_ptr,  # int32
    books_ptr,  # flat int8
    book_scales_ptr,  # [B] float32
    scales_ptr,  # [O] float16
    bands_ptr,  # [B, BAND_FIELDS] int32
    permutation_ptr,  # [I] int32
    out_ptr,  # [T, I]
    out_features,
    in_features,
    band_count,
    HAS_PERMUTATION: tl.constexpr,
    BAND_FIELDS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[t, permutation[j]] = W[ids[t], permuted channel j]."""
    # program (t, c) -> token t, permuted channels c * BLOCK_I ..
    token, first_channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I
    channels = first_channel + tl.arange(0, BLOCK_I)
    row = tl.load(ids_ptr + token)
    is_row = (row >= 0) & (row < out_features)
    row = tl.where(is_row, row, 0)
    tile, unit = row // TILE_ROWS, row % TILE_ROWS // UNIT_ROWS
    weights = tl.zeros((BLOCK_I,), tl.float32)
    for b in range(band_count):
        fields_ptr = bands_ptr + b * BAND_FIELDS
        start, groups = tl.load(fields_ptr + 5), tl.load(fields_ptr + 6)
        if (start < first_channel + BLOCK_I) & (start + groups * 8 > first_channel):
            rate = tl.load(fields_ptr + 2)
            local = channels - start
            inside = (local >= 0) & (local < groups * 8)
            group = tile * groups + local // 8
            end = rate * ((row % UNIT_ROWS).to(tl.int32) * 8 + local % 8 + 1)  # bits of the unit
            word = (end - 1) // 32
            place = tl.load(fields_ptr + 7) + (group * rate + word) * UNITS + unit
            low = tl.load(codes_ptr + place, mask=inside, other=0)
            above = tl.where(word == 0, place + (rate - 1) * UNITS - 1, place - UNITS)
            halo = halos_ptr + tl.load(fields_ptr + 8) + group
            is_first = (word == 0) & (unit == 0)
            high = tl.load(tl.where(is_first, halo, codes_ptr + above), mask=inside, other=0)
            both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            mask = (1 << tl.load(fields_ptr + 3)) - 1
            entry = (both >> (32 * (word + 1) - end)) & mask
            found = tl.load(books_ptr + tl.load(fields_ptr + 4) + entry, mask=inside, other=0)
            weights += found.to(tl.float32) * tl.load(book_scales_ptr + b)
    weights = tl.where(is_row, weights * tl.load(scales_ptr + row).to(tl.float32), 0.0)
    channel_mask = channels < in_features
    target = channels
    if HAS_PERMUTATION:
        target = tl.load(permutation_ptr + channels, mask=channel_mask, other=0)
    tl.store(
        out_ptr + token * in_features + target,
        weights.to(out_ptr.dtype.element_ty),
        mask=channel_mask,
    )


def vq_embedding(ids: Tensor, weight: PackedVQ, dtype: torch.dtype) -> Tensor:
    """Decode the rows `ids [T]` int64: `[T, I]` in `dtype`."""
    layout, tensors = weight.layout, weight.tensors
    permutation = tensors.get("permutation")
    made = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(ids.shape[0], layout.in_features, dtype=made, device=weight.device)
    with torch.cuda.device_of(out):
        trellis_embedding_kernel[(ids.shape[0], triton.cdiv(layout.in_features, BLOCK_I))](
            ids.contiguous(),
            tensors["codes"].view(torch.int32),
            tensors["halos"],
            tensors["codebooks"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["bands"],
            tensors["bands"] if permutation is None else permutation,
            out,
            layout.out_features,
            layout.in_features,
            len(layout.bands),
            HAS_PERMUTATION=permutation is not None,
            BAND_FIELDS=BAND_FIELDS,
            BLOCK_I=BLOCK_I,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out.to(dtype)
