"""The device function that attends rows of queries to a tile of cached tokens (both attentions).

Called in loops by the kernels of `paged_attention` and `paged_prefill`. A row's softmax runs from
tile to tile and reads nothing of other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    cache_ptr,
    scales_ptr,
    slots,  # [TILE] int64
    mask,  # [TILE]
    head,
    dims,
    heads,
    head_dim,
    QUANTIZED: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Load `[TILE, DIMS]` of one head at the slots, in `dtype`, scaled if int8; 0 where masked."""
    rows = slots * heads + head
    wanted = (dims < head_dim)[None, :]
    if MASKED:
        wanted = wanted & mask[:, None]
    tile = tl.load(cache_ptr + rows[:, None] * head_dim + dims[None, :], mask=wanted, other=0)
    if QUANTIZED:
        if MASKED:
            scales = tl.load(scales_ptr + rows, mask=mask, other=0.0)
        else:
            scales = tl.load(scales_ptr + rows)
        tile = tile.to(tl.float32) * scales.to(tl.float32)[:, None]
    return tile.to(dtype)


@triton.jit
def attend_tile(
    q,  # [ROWS, DIMS]
    begin,
    positions,  # [ROWS]: the last token each row sees
    context,
    key_ptr,  # [num_blocks, block_size, Hk, Dh]
    value_ptr,
    key_scales_ptr,  # [num_blocks, block_size, Hk] float16
    value_scales_ptr,
    blocks_ptr,  # [max_blocks] int32, of this request
    head,
    heads,
    dims,
    head_dim,
    score_scale,  # scale * log2(e)
    top,  # [ROWS]: largest score so far
    mass,  # [ROWS]: sum of exponentials
    total,  # [ROWS, DIMS]: weighted sum of values
    MASKED: tl.constexpr,  # whether some row does not see some token, or one is past the context
    QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add tokens `begin ..` of one request and head to the running softmax of every row."""
    tokens = begin + tl.arange(0, TILE)
    cached = tokens < context
    if MASKED:
        blocks = tl.load(blocks_ptr + tokens // BLOCK_SIZE, mask=cached, other=0)
    else:
        blocks = tl.load(blocks_ptr + tokens // BLOCK_SIZE)
    # A page may lie more than 2^31 numbers into a cache: from here on, places are int64.
    slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    k = load_tile(
        key_ptr, key_scales_ptr, slots, cached, head, dims, heads, head_dim,
        QUANTIZED, MASKED, q.dtype,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    # After the mask: what is fused with what, and so the bits, must not depend on MASKED.
    scores *= score_scale
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    faded = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    v = load_tile(
        value_ptr, value_scales_ptr, slots, cached, head, dims, heads, head_dim,
        QUANTIZED, MASKED, q.dtype,
    )  # fmt: skip
    total = tl.dot(weights.to(q.dtype), v, total * faded[:, None])
    return new_top, mass * faded + tl.sum(weights, axis=1), total
