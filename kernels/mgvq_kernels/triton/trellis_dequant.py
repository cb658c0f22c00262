"""A trellis decoded to a dense matrix (called by `ops` on a GPU).

Bit for bit what `reference.vq_dequantize` gives: the table holds codewords times their scale, the
row scale multiplies last, one cast at the end. For many rows of x a slice of the dense matrix lives
for one matrix product, as in `vq_dequant`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.trellis_order import BAND_FIELDS
from mgvq_kernels.triton.trellis_tile import (
    TILE_ROWS,
    load_table,
    load_words,
    look_up_rows,
    place_band,
)
from mgvq_kernels.triton.vq_dequant import slice_rows

NUM_WARPS = 8

GROUPS = 8
"""Groups of a program: 64 channels. The tile is turned in shared memory, 64 KiB in float32."""


@triton.jit
def trellis_dequant_kernel(
    codes_ptr,  # tiles of int32
    halos_ptr,  # int32
    books_ptr,  # flat int8
    book_scales_ptr,  # [B] float32
    scales_ptr,  # [O] float16
    bands_ptr,  # [B, BAND_FIELDS] int32
    out_ptr,  # [end - first row, I]
    band,
    first_row,
    end_row,
    in_features,
    RATE: tl.constexpr,
    GROUPS: tl.constexpr,
    BAND_FIELDS: tl.constexpr,
):
    """out[o - first_row, j] = W[o] of permuted channel j, in one band."""
    # program (p, c) -> the p-th tile from that of first_row on, groups c * GROUPS .. of the band
    tile, first_group = first_row // TILE_ROWS + tl.program_id(0), tl.program_id(1) * GROUPS
    fields_ptr = bands_ptr + band * BAND_FIELDS
    word, halo, start, groups = place_band(fields_ptr, tile, RATE)
    table = load_table(books_ptr, book_scales_ptr + band, fields_ptr)
    words = load_words(codes_ptr + word, halos_ptr + halo, first_group, groups, RATE, GROUPS)
    weights = look_up_rows(table, words, RATE, GROUPS)
    rows = tile.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = first_group * 8 + tl.arange(0, GROUPS * 8)
    row_mask = (rows >= first_row) & (rows < end_row)
    weights *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + (rows - first_row)[:, None] * in_features + (start + channels)[None, :],
        weights.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (channels < groups * 8)[None, :],
    )


def vq_dequantize(weight: PackedVQ, dtype: torch.dtype) -> Tensor:
    """Decode a matrix: `[O, I]` in `dtype`, original channel order."""
    dense = decode_rows(weight, dtype, 0, weight.layout.out_features)
    permutation = weight.tensors.get("permutation")
    return dense if permutation is None else dense[:, permutation.argsort()]


def decode_rows(weight: PackedVQ, dtype: torch.dtype, first: int, end: int) -> Tensor:
    """Decode the rows first..end of a matrix: `[end - first, I]` in `dtype`, channels as stored."""
    layout, tensors = weight.layout, weight.tensors
    made = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(end - first, layout.in_features, dtype=made, device=weight.device)
    tiles = triton.cdiv(end, TILE_ROWS.value) - first // TILE_ROWS.value
    for b, band in enumerate(layout.bands):
        with torch.cuda.device_of(out):
            trellis_dequant_kernel[(tiles, triton.cdiv(band.width, GROUPS * 8))](
                tensors["codes"].view(torch.int32),
                tensors["halos"],
                tensors["codebooks"],
                tensors["codebook_scales"],
                tensors["scales"],
                tensors["bands"],
                out,
                b,
                first,
                end,
                layout.in_features,
                RATE=band.rate,
                GROUPS=GROUPS,
                BAND_FIELDS=BAND_FIELDS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return out.to(dtype)


def decode_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply many rows `x [..., I]` by the matrix, decoded slice by slice: `[..., O]`.

    The loop of `vq_dequant` again: sharing it would touch that file, and the tables tuned on a GPU
    hold for its source as it is. Make them one when those are tuned anew.
    """
    layout = weight.layout
    rows = x.reshape(-1, layout.in_features)  # [T, I]
    if (permutation := weight.tensors.get("permutation")) is not None:
        rows = rows.index_select(1, permutation)
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size if x.is_cuda else 0
    step = slice_rows(layout.in_features, x.element_size(), cache)
    y = torch.empty(rows.shape[0], layout.out_features, dtype=x.dtype, device=x.device)
    for first in range(0, layout.out_features, step):
        end = min(first + step, layout.out_features)
        torch.mm(rows, decode_rows(weight, x.dtype, first, end).t(), out=y[:, first:end])
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], layout.out_features)
