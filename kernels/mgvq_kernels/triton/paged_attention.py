"""Decode attention over a paged cache: one new token a request (called by `ops`).

A request's context is cut into splits of 256 tokens, whatever else is in the batch, so that its
result is its own and a captured graph serves any length. All query heads of a key/value head are
the rows of one product. The last step adds the splits in order. Keys and values may be int8 with a
scale a token and head. Half precision in, float32 inside; registered with torch.library.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.triton.kv_tile import attend_tile
from mgvq_kernels.tuned import launch_options

SPLIT_TOKENS = 256
"""Tokens of a split: fixed, so that sums are taken in one order at any batch."""

TILE_TOKENS = 32
"""Tokens of a step."""


@triton.jit
def attend_split_kernel(
    q_ptr,  # [R, H, Dh]
    key_ptr,  # [num_blocks, block_size, Hk, Dh]
    value_ptr,
    key_scales_ptr,  # [num_blocks, block_size, Hk] float16
    value_scales_ptr,
    block_table_ptr,  # [R, max_blocks] int32
    context_lens_ptr,  # [R] int32
    sums_ptr,  # [R, splits, H, Dh] float32
    tops_ptr,  # [R, splits, H, 2] float32: largest score, sum of exponentials
    score_scale,  # scale * log2(e)
    num_heads,
    num_kv_heads,
    head_dim,
    max_blocks,
    QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # 16 or more: at least the query heads of a key/value head
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend to one split of one request for the query heads of one key/value head."""
    # program (r, h, s) -> request r, key/value head h, tokens s * SPLIT ..
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens_ptr + request)
    first = split * SPLIT
    if first < context:
        siblings = num_heads // num_kv_heads
        sibling, dims = tl.arange(0, HEADS), tl.arange(0, DIMS)
        head = kv_head * siblings + sibling
        here = (sibling < siblings)[:, None]
        wanted = here & (dims < head_dim)[None, :]
        q_place = (request * num_heads + head)[:, None] * head_dim + dims[None, :]
        q = tl.load(q_ptr + q_place, mask=wanted, other=0.0)
        top = tl.full((HEADS,), float("-inf"), tl.float32)
        mass = tl.zeros((HEADS,), tl.float32)
        total = tl.zeros((HEADS, DIMS), tl.float32)
        positions = tl.full((HEADS,), 0, tl.int32) + context - 1
        for begin in range(first, tl.minimum(first + SPLIT, context), TILE):
            top, mass, total = attend_tile(
                q, begin, positions, context, key_ptr, value_ptr, key_scales_ptr,
                value_scales_ptr, block_table_ptr + request * max_blocks, kv_head, num_kv_heads,
                dims, head_dim, score_scale, top, mass, total, True, QUANTIZED, BLOCK_SIZE, TILE,
            )  # fmt: skip
        slot = (request * tl.num_programs(2) + split).to(tl.int64) * num_heads + head
        tl.store(sums_ptr + slot[:, None] * head_dim + dims[None, :], total, mask=wanted)
        tl.store(tops_ptr + slot * 2, top, mask=sibling < siblings)
        tl.store(tops_ptr + slot * 2 + 1, mass, mask=sibling < siblings)


@triton.jit
def combine_splits_kernel(
    sums_ptr,
    tops_ptr,
    context_lens_ptr,
    out_ptr,  # [R, H, Dh]
    num_heads,
    head_dim,
    splits,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Weigh the splits of one request and head against each other, in order."""
    # program (r, h) -> request r, query head h
    request, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, DIMS)
    count = tl.cdiv(tl.load(context_lens_ptr + request), SPLIT)
    top, mass = float("-inf"), 0.0
    total = tl.zeros((DIMS,), tl.float32)
    for split in range(count):
        slot = (request * splits + split).to(tl.int64) * num_heads + head
        split_top = tl.load(tops_ptr + slot * 2)
        new_top = tl.maximum(top, split_top)
        kept, added = tl.exp2(top - new_top), tl.exp2(split_top - new_top)
        mass = mass * kept + tl.load(tops_ptr + slot * 2 + 1) * added
        part = tl.load(sums_ptr + slot * head_dim + dims, mask=dims < head_dim, other=0.0)
        total = total * kept + part * added
        top = new_top
    out = (total / mass).to(out_ptr.dtype.element_ty)
    place = (request * num_heads + head) * head_dim + dims
    tl.store(out_ptr + place, out, mask=dims < head_dim)


@torch.library.custom_op("mgvq::triton_paged_attention_decode", mutates_args=())
def paged_attention_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Launch both kernels; arguments as `ops.paged_attention_decode`, checked. `[R, H, Dh]`."""
    requests, heads, head_dim = q.shape
    block_size, kv_heads = key_cache.shape[1:3]
    splits = triton.cdiv(block_table.shape[1] * block_size, SPLIT_TOKENS)
    dims = triton.next_power_of_2(head_dim)
    sums = torch.empty(requests, splits, heads, head_dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(requests, splits, heads, 2, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        attend_split_kernel[(requests, kv_heads, splits)](
            q,
            key_cache,
            value_cache,
            q if key_scales is None else key_scales,
            q if value_scales is None else value_scales,
            block_table,
            context_lens,
            sums,
            tops,
            scale * math.log2(math.e),
            heads,
            kv_heads,
            head_dim,
            block_table.shape[1],
            QUANTIZED=key_scales is not None,
            BLOCK_SIZE=block_size,
            HEADS=max(16, triton.next_power_of_2(heads // kv_heads)),
            DIMS=dims,
            SPLIT=SPLIT_TOKENS,
            TILE=TILE_TOKENS,
            **launch_options(q.device, "attend_split", num_warps=4),
        )
        combine_splits_kernel[(requests, heads)](
            sums,
            tops,
            context_lens,
            out,
            heads,
            head_dim,
            splits,
            DIMS=dims,
            SPLIT=SPLIT_TOKENS,
            num_warps=4,
        )
    return out


@paged_attention_decode.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    return torch.empty_like(q)
