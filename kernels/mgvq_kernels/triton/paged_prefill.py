"""Attention of prompts over a paged cache: chunks of any lengths, causal (called by `ops`).

The rows of a program are the query heads of one key/value head for a few neighbouring tokens of
one request, so that a key is read once for all of them. Tokens every row sees are added without
masks, the rest with. A row reads the context in tiles of one size from its first token on: its sum
is the same in any batch and any chunk. Half precision in, float32 inside; registered with
torch.library.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.triton.kv_tile import attend_tile

TILE_ROWS = 64
"""Rows of a program, unless more query heads than that share a key/value head."""

TILE_TOKENS = 32
"""Cached tokens of a step. 64 spill on Ampere, compiled with 64 rows or with 128."""

NUM_STAGES = 2
"""Tiles on the way from memory at once."""


def max_registers(dims: int) -> int | None:
    """Say how many registers a thread may use; None leaves it to the assembler.

    Left alone, it spills at 168 on Ampere and Ada with heads of 64 in int8; with heads of 128 in
    int8 it is the bound that makes it spill, on sm_80.
    """
    return 255 if dims <= 64 else None


@triton.jit
def find_request(offsets_ptr, requests, block, QUERIES: tl.constexpr):
    """Say which request owns a block of queries: `(request, the block's first query in it)`.

    Request i owns the blocks from `offsets[i] // QUERIES + i` on: at least as many as it needs,
    known without a sum over requests.
    """
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets_ptr + middle) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle
    return low, (block - tl.load(offsets_ptr + low) // QUERIES - low) * QUERIES


@triton.jit
def attend_chunk_kernel(
    q_ptr,  # [T, H, Dh]
    key_ptr,  # [num_blocks, block_size, Hk, Dh]
    value_ptr,
    key_scales_ptr,  # [num_blocks, block_size, Hk] float16
    value_scales_ptr,
    block_table_ptr,  # [R, max_blocks] int32
    cu_seqlens_q_ptr,  # [R + 1] int32
    context_lens_ptr,  # [R] int32
    out_ptr,  # [T, H, Dh]
    score_scale,  # scale * log2(e)
    num_heads,
    num_kv_heads,
    head_dim,
    max_blocks,
    requests,
    QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,  # tokens of a program: ROWS // (query heads of a key/value head)
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend a block of queries of one request, for the query heads of one key/value head."""
    # program (b, h) -> block b of queries, counted over all requests; key/value head h
    kv_head = tl.program_id(1)
    request, first = find_request(cu_seqlens_q_ptr, requests, tl.program_id(0), QUERIES)
    start = tl.load(cu_seqlens_q_ptr + request)
    q_len = tl.load(cu_seqlens_q_ptr + request + 1) - start
    if first < q_len:
        siblings = num_heads // num_kv_heads
        row, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
        query = first + row // siblings
        end = tl.minimum(first + QUERIES, q_len)
        head = kv_head * siblings + row % siblings
        wanted = (query < end)[:, None] & (dims < head_dim)[None, :]
        q_place = ((start + query) * num_heads + head)[:, None] * head_dim + dims[None, :]
        q = tl.load(q_ptr + q_place, mask=wanted, other=0.0)
        cached = tl.load(context_lens_ptr + request) - q_len  # tokens before the chunk
        positions = cached + query
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DIMS), tl.float32)
        blocks_ptr = block_table_ptr + request * max_blocks
        seen_by_all = (cached + first + 1) // TILE * TILE
        for begin in range(0, seen_by_all, TILE):
            top, mass, total = attend_tile(
                q, begin, positions, cached + end, key_ptr, value_ptr, key_scales_ptr,
                value_scales_ptr, blocks_ptr, kv_head, num_kv_heads, dims, head_dim, score_scale,
                top, mass, total, False, QUANTIZED, BLOCK_SIZE, TILE,
            )  # fmt: skip
        for begin in range(seen_by_all, cached + end, TILE):
            top, mass, total = attend_tile(
                q, begin, positions, cached + end, key_ptr, value_ptr, key_scales_ptr,
                value_scales_ptr, blocks_ptr, kv_head, num_kv_heads, dims, head_dim, score_scale,
                top, mass, total, True, QUANTIZED, BLOCK_SIZE, TILE,
            )  # fmt: skip
        out = (total / mass[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_place, out, mask=wanted)


@torch.library.custom_op("mgvq::triton_paged_attention_prefill", mutates_args=())
def paged_attention_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Launch the kernel; arguments as `ops.paged_attention_prefill`, checked. `[T, H, Dh]`."""
    tokens, heads, head_dim = q.shape
    block_size, kv_heads = key_cache.shape[1:3]
    requests, max_blocks = block_table.shape
    siblings = heads // kv_heads
    rows = max(TILE_ROWS, triton.next_power_of_2(siblings))
    queries = rows // siblings
    dims = triton.next_power_of_2(head_dim)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        attend_chunk_kernel[(tokens // queries + requests, kv_heads)](
            q,
            key_cache,
            value_cache,
            q if key_scales is None else key_scales,
            q if value_scales is None else value_scales,
            block_table,
            cu_seqlens_q,
            context_lens,
            out,
            scale * math.log2(math.e),
            heads,
            kv_heads,
            head_dim,
            max_blocks,
            requests,
            QUANTIZED=key_scales is not None,
            BLOCK_SIZE=block_size,
            ROWS=rows,
            QUERIES=queries,
            DIMS=dims,
            TILE=TILE_TOKENS,
            num_warps=4,
            num_stages=NUM_STAGES,
            maxnreg=max_registers(dims),
        )
    return out


@paged_attention_prefill.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    return torch.empty_like(q)
