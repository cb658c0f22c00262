"""Few rows times a packed matrix, straight from codes (called by `ops.vq_linear` on a GPU).

One program makes 8 outputs of one row of x: it gathers codebook entries and accumulates in
float32, so that a row's result does not depend on the others in the batch. Registered with
torch.library, so that torch.compile keeps it as one call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.weight_tile import weight_tile

BLOCK_O = 8
BLOCK_I = 128
"""48 registers, no spill on sm_80 to sm_90; 16 x 128 and 16 x 64 spill (triton 3.9, 2026-11)."""


@triton.jit
def vq_linear_kernel(
    x_ptr,  # [T, I]
    codes_ptr,  # flat uint8
    books_ptr,  # flat int8
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    schedule_ptr,  # [M, 5] int64
    permutation_ptr,  # [I] int32
    bias_ptr,  # [O]
    y_ptr,  # [T, O]
    out_features,
    in_features,
    stage_count,
    HAS_PERMUTATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o]."""
    # program (p, t) -> outputs p * BLOCK_O .. of row t
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(1).to(tl.int64)
    row_mask = rows < out_features
    total = tl.zeros((BLOCK_O,), tl.float32)
    for begin in range(0, in_features, BLOCK_I):
        channels = begin + tl.arange(0, BLOCK_I)
        channel_mask = channels < in_features
        source = channels
        if HAS_PERMUTATION:
            source = tl.load(permutation_ptr + channels, mask=channel_mask, other=0)
        x = tl.load(x_ptr + token * in_features + source, mask=channel_mask, other=0.0)
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
        total += tl.sum(weights * x.to(tl.float32)[None, :], axis=1)
    y = total * tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * out_features + rows, y.to(y_ptr.dtype.element_ty), mask=row_mask)


@torch.library.custom_op("mgvq::triton_vq_linear", mutates_args=())
def triton_vq_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    schedule: Tensor,
    permutation: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Launch the kernel on `x [T, I]`; the rest is a `PackedVQ`'s tensors. Returns `[T, O]`."""
    tokens, in_features = x.shape
    out_features = scales.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    with torch.cuda.device_of(x):
        vq_linear_kernel[(triton.cdiv(out_features, BLOCK_O), tokens)](
            x.contiguous(),
            codes,
            codebooks,
            codebook_scales,
            scales,
            schedule,
            schedule if permutation is None else permutation,
            scales if bias is None else bias.contiguous(),
            y,
            out_features,
            in_features,
            schedule.shape[0],
            HAS_PERMUTATION=permutation is not None,
            HAS_BIAS=bias is not None,
            BLOCK_O=BLOCK_O,
            BLOCK_I=BLOCK_I,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y


@triton_vq_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    schedule: Tensor,
    permutation: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def vq_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply few rows `x [..., I]` straight from codes: `[..., O]` in x's dtype."""
    tensors = weight.tensors
    wide = x.float() if x.dtype == torch.float64 else x
    y = triton_vq_linear(
        wide.reshape(-1, weight.layout.in_features),
        tensors["codes"],
        tensors["codebooks"],
        tensors["codebook_scales"],
        tensors["scales"],
        tensors["schedule"],
        tensors.get("permutation"),
        bias,
    )
    return y.view(*x.shape[:-1], weight.layout.out_features).to(x.dtype)
