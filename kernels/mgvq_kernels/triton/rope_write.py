"""Rotary embedding and the write into the paged caches (called by `dense_ops` on a GPU).

One kernel for three ops: it turns queries and keys, or leaves them, and puts keys and values at
slots of a cache, in its dtype or as int8 with a scale a token and head, or keys in a new tensor.
Float32 inside, without fused multiply-add: to the bit what `reference` computes. No gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and taking it away rounds a small float32 to the nearest even integer."""


@triton.jit
def turn(first, second, cos_ptr, sin_ptr, place, half, mask):
    """Rotate the two halves of a vector by the angles at `place`."""
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32)
    far_cos = tl.load(cos_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    far_sin = tl.load(sin_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * far_cos + first * far_sin


@triton.jit
def to_codes(x, step):
    """Round to int8 by a float32 step; zeros where the step is 0, infinite or NaN."""
    is_usable = (step > 0.0) & (step < float("inf"))
    codes = tl.div_rn(x, tl.where(is_usable, step, 1.0))
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.where(is_usable, (codes + ROUNDER) - ROUNDER, 0.0).to(tl.int8)


@triton.jit
def store_row(
    cache_ptr,  # [slots * Hk, Dh]
    scales_ptr,  # [slots * Hk] float16
    row,
    first,
    second,
    near,
    half,
    mask,
    head_dim,
    QUANTIZED: tl.constexpr,
):
    """Store the halves of a vector at a row of a cache, in its dtype or as codes and a scale."""
    out = cache_ptr + row * head_dim + near
    if QUANTIZED:
        size = tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL)
        is_nan = tl.max((size != size).to(tl.int32), axis=0) > 0
        top = tl.where(is_nan, float("nan"), tl.max(size, axis=0))
        scale = tl.div_rn(top, 127.0).to(tl.float16)
        tl.store(scales_ptr + row, scale)
        first = to_codes(first, scale.to(tl.float32))
        second = to_codes(second, scale.to(tl.float32))
    tl.store(out, first.to(cache_ptr.dtype.element_ty), mask=mask)
    tl.store(out + half, second.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_write_kernel(
    q_ptr,  # [T, H, Dh], tokens `q_stride` apart
    k_ptr,  # [T, Hk, Dh], tokens `k_stride` apart
    v_ptr,  # [T, Hk, Dh], tokens `v_stride` apart
    cos_ptr,  # [T, Dh]
    sin_ptr,  # [T, Dh]
    slots_ptr,  # [T] int64
    q_out_ptr,  # [T, H, Dh]
    key_ptr,  # [slots, Hk, Dh]
    value_ptr,  # [slots, Hk, Dh]
    key_scales_ptr,  # [slots, Hk] float16
    value_scales_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_heads,
    num_kv_heads,
    head_dim,
    ROTATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,  # otherwise token t goes to slot t
    QUANTIZED: tl.constexpr,
    HALF: tl.constexpr,  # at least half of head_dim
):
    """Handle one head of one token: a query, a key or a value."""
    # program (t, h) -> token t; query head h, then key heads, then value heads
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = head_dim // 2
    near = tl.arange(0, HALF)
    mask = near < half
    angle = token * head_dim + near
    if head < num_heads:
        query = q_ptr + token * q_stride + head * head_dim + near
        first = tl.load(query, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(query + half, mask=mask, other=0.0).to(tl.float32)
        first, second = turn(first, second, cos_ptr, sin_ptr, angle, half, mask)
        turned = q_out_ptr + (token * num_heads + head) * head_dim + near
        tl.store(turned, first.to(q_out_ptr.dtype.element_ty), mask=mask)
        tl.store(turned + half, second.to(q_out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token) if HAS_SLOTS else token
        kv_head = (head - num_heads) % num_kv_heads
        is_key = head < num_heads + num_kv_heads
        source = k_ptr + token * k_stride
        cache, scales = key_ptr, key_scales_ptr
        if head >= num_heads + num_kv_heads:
            source = v_ptr + token * v_stride
            cache, scales = value_ptr, value_scales_ptr
        source += kv_head * head_dim + near
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        if ROTATE:
            if is_key:
                first, second = turn(first, second, cos_ptr, sin_ptr, angle, half, mask)
                # a key is rounded before it is stored, whatever the cache holds
                first = first.to(k_ptr.dtype.element_ty).to(tl.float32)
                second = second.to(k_ptr.dtype.element_ty).to(tl.float32)
        row = slot * num_kv_heads + kv_head
        store_row(cache, scales, row, first, second, near, half, mask, head_dim, QUANTIZED)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `q [T, H, Dh]` and `k [T, Hk, Dh]` into new tensors."""
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q_out = _launch(q, k, None, (cos, sin), (k_out, k_out), None, (None, None))
    return q_out, k_out


def write_kv(
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Store `k, v [T, Hk, Dh]` at their slots."""
    scales = (key_scales, value_scales)
    _launch(None, k, v, None, (key_cache, value_cache), slot_mapping, scales)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Turn q and k, store k and v at their slots; returns the turned q."""
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    return _launch(q, k, v, (cos, sin), caches, slot_mapping, scales)


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    caches: tuple[Tensor, Tensor],
    slot_mapping: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Launch the kernel on the heads there are; returns the turned queries, or k without any."""
    tokens, kv_heads, head_dim = k.shape
    k = _with_whole_tokens(k)
    v = k if (values := v) is None else _with_whole_tokens(values)
    heads = 0 if q is None else q.shape[1]
    q = k if q is None else _with_whole_tokens(q)
    cos, sin = (k, k) if angles is None else (angles[0].contiguous(), angles[1].contiguous())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if heads else k
    grid = (tokens, heads + (1 if values is None else 2) * kv_heads)
    if not tokens:
        return out
    with torch.cuda.device_of(k):
        rope_write_kernel[grid](
            q,
            k,
            v,
            cos,
            sin,
            k if slot_mapping is None else slot_mapping.contiguous(),
            out,
            *caches,
            *(k if scale is None else scale for scale in scales),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            heads,
            kv_heads,
            head_dim,
            ROTATE=angles is not None,
            HAS_SLOTS=slot_mapping is not None,
            QUANTIZED=scales[0] is not None,
            HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


def _with_whole_tokens(x: Tensor) -> Tensor:
    """Give back `x [T, Hk, Dh]`, copied only if a token's numbers are not side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
