"""Norms and gating, a row a program (called by `dense_ops` on a GPU in half precision).

Read once, computed in float32, cast once, to the bit what `reference` computes up to the order of
the sum of squares. What they save is launches, not bandwidth. No gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_NORM_WIDTH = 16384
"""Widest row a norm holds in one program's registers."""

BLOCK_F = 1024
"""Features of a gating program."""


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    out_ptr,  # [T, D]
    total_ptr,  # [T, D]: x + residual
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise one row; with a residual, add it first, round the sum and keep it."""
    # program (t) -> row t
    row = tl.program_id(0).to(tl.int64) * width
    places = tl.arange(0, BLOCK)
    mask = places < width
    x = tl.load(x_ptr + row + places, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + places, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + places, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + places, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=0) / width
    y = x * (1.0 / tl.sqrt_rn(mean + eps)) * weight
    tl.store(out_ptr + row + places, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [T, 2F]
    out_ptr,  # [T, F]
    features,
    BLOCK: tl.constexpr,
):
    """Gate the second half of a row with the SiLU of the first."""
    # program (t, c) -> row t, features c * BLOCK ..
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < features
    gate_up_ptr += row * 2 * features
    gate = tl.load(gate_up_ptr + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + features + places, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * features + places, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch the norm on rows `x [..., D]`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, out, eps, False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the norm on rows `x + residual [..., D]`: the norm and the sum."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, out, total, eps, True)
    return out, total


def swiglu(gate_up: Tensor) -> Tensor:
    """Launch the gate on rows `gate_up [..., 2F]`."""
    gate_up = gate_up.contiguous()
    features = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], features)
    if out.numel():
        with torch.cuda.device_of(out):
            swiglu_kernel[(out.numel() // features, triton.cdiv(features, BLOCK_F))](
                gate_up, out, features, BLOCK=BLOCK_F, num_warps=4
            )
    return out


def norm_warps(width: int) -> int:
    """Choose the warps of a norm's program: about 16 numbers a thread, 16 warps at most."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def _launch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
    has_residual: bool,
) -> None:
    width = x.shape[-1]
    if not x.numel():
        return
    with torch.cuda.device_of(x):
        rms_norm_kernel[(x.numel() // width,)](
            x,
            residual,
            weight.contiguous(),
            out,
            total,
            width,
            eps,
            HAS_RESIDUAL=has_residual,
            BLOCK=triton.next_power_of_2(width),
            num_warps=norm_warps(width),
        )
