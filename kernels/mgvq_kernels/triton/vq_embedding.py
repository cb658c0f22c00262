"""Rows of a packed table decoded (called by `ops.vq_embedding` on a GPU).

An id outside the table gives a row of zeros: looking at ids on the host would stall the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.block_order import padded_rows
from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.weight_tile import weight_tile

BLOCK_I = 256


@triton.jit
def vq_embedding_kernel(
    ids_ptr,  # [T] int64
    codes_ptr,  # blocks of uint8
    books_ptr,  # flat int8
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    stages_ptr,  # [M, STAGE_FIELDS] int32
    permutation_ptr,  # [I] int32
    out_ptr,  # [T, I]
    out_features,
    padded_rows,
    in_features,
    stage_count,
    HAS_PERMUTATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[t, permutation[j]] = W[ids[t], permuted channel j]."""
    # program (t, c) -> token t, permuted channels c * BLOCK_I ..
    token = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * BLOCK_I
    channels = first_channel + tl.arange(0, BLOCK_I)
    channel_mask = channels < in_features
    rows = tl.load(ids_ptr + token + tl.arange(0, 1))  # [1]
    row_mask = (rows >= 0) & (rows < out_features)
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
    target = channels
    if HAS_PERMUTATION:
        target = tl.load(permutation_ptr + channels, mask=channel_mask, other=0)
    tl.store(
        out_ptr + token * in_features + target[None, :],
        weights.to(out_ptr.dtype.element_ty),
        mask=channel_mask[None, :],
    )


def vq_embedding(ids: Tensor, weight: PackedVQ, dtype: torch.dtype) -> Tensor:
    """Decode the rows `ids [T]` int64: `[T, I]` in `dtype`."""
    layout, tensors = weight.layout, weight.tensors
    permutation = tensors.get("permutation")
    made = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(ids.shape[0], layout.in_features, dtype=made, device=weight.device)
    with torch.cuda.device_of(out):
        vq_embedding_kernel[(ids.shape[0], triton.cdiv(layout.in_features, BLOCK_I))](
            ids.contiguous(),
            tensors["codes"],
            tensors["codebooks"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["stages"],
            tensors["stages"] if permutation is None else permutation,
            out,
            layout.out_features,
            padded_rows(layout.out_features),
            layout.in_features,
            layout.num_codebooks,
            HAS_PERMUTATION=permutation is not None,
            BLOCK_I=BLOCK_I,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out.to(dtype)
