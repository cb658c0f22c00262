"""A packed matrix decoded to a dense one (called by `ops` on a GPU).

Bit for bit what `reference.vq_dequantize` gives: stages are summed in float32 without fused
multiply-add, the row scale multiplies last, one cast at the end. For many rows of x the dense
matrix lives for one matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.weight_tile import weight_tile

BLOCK_O = 16
BLOCK_I = 128


@triton.jit
def vq_dequant_kernel(
    codes_ptr,  # flat uint8
    books_ptr,  # flat int8
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    schedule_ptr,  # [M, 5] int64
    permutation_ptr,  # [I] int32
    out_ptr,  # [O, I]
    out_features,
    in_features,
    stage_count,
    HAS_PERMUTATION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[o, permutation[j]] = W of permuted channel j."""
    # program (p, c) -> rows p * BLOCK_O .., permuted channels c * BLOCK_I ..
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    channels = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_mask, channel_mask = rows < out_features, channels < in_features
    weights = weight_tile(
        codes_ptr,
        books_ptr,
        book_scales_ptr,
        schedule_ptr,
        stage_count,
        rows,
        row_mask,
        channels,
        channel_mask,
    )
    weights *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    target = channels
    if HAS_PERMUTATION:
        target = tl.load(permutation_ptr + channels, mask=channel_mask, other=0)
    tl.store(
        out_ptr + rows[:, None] * in_features + target[None, :],
        weights.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )


def vq_dequantize(weight: PackedVQ, dtype: torch.dtype) -> Tensor:
    """Decode a matrix: `[O, I]` in `dtype`, original channel order."""
    layout, tensors = weight.layout, weight.tensors
    permutation = tensors.get("permutation")
    made = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(layout.out_features, layout.in_features, dtype=made, device=weight.device)
    grid = (triton.cdiv(layout.out_features, BLOCK_O), triton.cdiv(layout.in_features, BLOCK_I))
    with torch.cuda.device_of(out):
        vq_dequant_kernel[grid](
            tensors["codes"],
            tensors["codebooks"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["schedule"],
            tensors["schedule"] if permutation is None else permutation,
            out,
            layout.out_features,
            layout.in_features,
            layout.num_codebooks,
            HAS_PERMUTATION=permutation is not None,
            BLOCK_O=BLOCK_O,
            BLOCK_I=BLOCK_I,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out.to(dtype)


def decode_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply many rows `x [..., I]` by the decoded matrix: `[..., O]` in x's dtype."""
    dense = vq_dequantize(weight, x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
