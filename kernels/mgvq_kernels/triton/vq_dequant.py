"""A packed matrix decoded to a dense one (called by `ops` on a GPU).

Bit for bit what `reference.vq_dequantize` gives: stages are summed in float32 without fused
multiply-add, the row scale multiplies last, one cast at the end. For many rows of x a slice of
the dense matrix lives for one matrix product, in the L2 cache where it fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.block_order import ROW_MULTIPLE, padded_rows
from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.weight_tile import weight_tile
from mgvq_kernels.tuned import launch_options

BLOCK_O = 16
BLOCK_I = 128

LEAST_SLICE_BYTES = 8 << 20
"""Below this the launches of a slice cost more than what the cache saves."""


@triton.jit
def vq_dequant_kernel(
    codes_ptr,  # blocks of uint8
    books_ptr,  # flat int8
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    stages_ptr,  # [M, STAGE_FIELDS] int32
    out_ptr,  # [end - first row, I]
    first_row,
    end_row,
    padded_rows,
    in_features,
    stage_count,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[o, j] = W of permuted channel j."""
    # program (p, c) -> rows first_row + p * BLOCK_O .., permuted channels c * BLOCK_I ..
    rows = first_row + tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    first_channel = tl.program_id(1) * BLOCK_I
    channels = first_channel + tl.arange(0, BLOCK_I)
    row_mask, channel_mask = rows < end_row, channels < in_features
    weights = weight_tile(
        codes_ptr,
        books_ptr,
        book_scales_ptr,
        stages_ptr,
        stage_count,
        padded_rows,
        rows,
        row_mask,
        first_channel,
        BLOCK_I,
    )
    weights *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + (rows - first_row)[:, None] * in_features + channels[None, :],
        weights.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )


def vq_dequantize(weight: PackedVQ, dtype: torch.dtype) -> Tensor:
    """Decode a matrix: `[O, I]` in `dtype`, original channel order."""
    dense = decode_rows(weight, dtype, 0, weight.layout.out_features)
    permutation = weight.tensors.get("permutation")
    return dense if permutation is None else dense[:, permutation.argsort()]


def decode_rows(weight: PackedVQ, dtype: torch.dtype, first: int, end: int) -> Tensor:
    """Decode the rows first..end of a matrix: `[end - first, I]` in `dtype`, channels as stored.

    Bringing the channels back in order here would scatter every number alone: on an H100 203 us for
    3584x3584 in float16, against 13 us without.
    """
    layout, tensors = weight.layout, weight.tensors
    made = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(end - first, layout.in_features, dtype=made, device=weight.device)
    grid = (triton.cdiv(end - first, BLOCK_O), triton.cdiv(layout.in_features, BLOCK_I))
    with torch.cuda.device_of(out):
        vq_dequant_kernel[grid](
            tensors["codes"],
            tensors["codebooks"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["stages"],
            out,
            first,
            end,
            padded_rows(layout.out_features),
            layout.in_features,
            layout.num_codebooks,
            BLOCK_O=BLOCK_O,
            BLOCK_I=BLOCK_I,
            **launch_options(out.device, "vq_dequant", num_warps=4),
            enable_fp_fusion=False,
        )
    return out.to(dtype)


def slice_rows(in_features: int, element_bytes: int, cache_bytes: int) -> int:
    """Choose how many rows are decoded at once: whole tiles in a third of the L2 cache.

    Args:
        in_features: I.
        element_bytes: bytes of a decoded weight.
        cache_bytes: size of the L2 cache; below 24 MiB a slice is 8 MiB and may spill to memory.

    Returns:
        A multiple of 512.
    """
    room = max(cache_bytes // 3, LEAST_SLICE_BYTES)
    return max(1, room // (in_features * element_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE


def decode_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply many rows `x [..., I]` by the matrix, decoded slice by slice: `[..., O]`."""
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
