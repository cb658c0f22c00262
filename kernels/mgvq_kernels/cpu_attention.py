# mypy: disable-error-code="untyped-decorator"
"""Numba kernel of attention of single tokens over a paged cache (called by `cpu`).

Blocks are read where they lie, int8 ones multiplied by their scales as they are read; nothing is
gathered. A request's result depends on no other request. Nothing is checked here but the blocks'
numbers, which nobody else reads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import (  # noqa: TID253 (this file is made of it)
    carray,
    float32,
    int8,
    int32,
    int64,
    njit,
    uint16,
)

from mgvq_kernels.cpu_jit import compile_cached, pointer

PLAN_FIELDS = 16
"""Numbers of a plan before the offsets."""

FOUND_NO_BLOCK = 15
"""Where a plan says afterwards which row of block_table, counted from 1, names a block that is not
there; 0: none does."""

SUMS_IN_ANY_ORDER = {"reassoc", "nsz", "contract"}
"""What a dot product may do to be made of vectors; NaN and infinity keep their meaning."""


@njit(fastmath=SUMS_IN_ANY_ORDER)
def _dot(x: Any, y: Any) -> Any:
    total = float32(0.0)
    for d in range(x.size):
        total += x[d] * float32(y[d])
    return total


@njit
def _half(bits: int) -> Any:
    """Read a float16 that is not negative, which numba does not know on a CPU; infinity is NaN."""
    if bits >= 0x7C00:
        return float32(math.nan)
    return np.int32(bits << 13).view(np.float32) * float32(2.0**112)


@njit
def _softmax(scores: Any) -> Any:
    """Leave exp(score - best) in place; return one over their sum."""
    best = scores[0]
    for j in range(1, scores.size):
        best = max(best, scores[j])
    total = float32(0.0)
    for j in range(scores.size):
        scores[j] = math.exp(scores[j] - best)
        total += scores[j]
    return float32(1.0) / total


@njit(fastmath={"contract"})
def _add_scaled(out: Any, x: Any, factor: Any) -> None:
    for d in range(out.size):
        out[d] += factor * float32(x[d])


@njit
def _attend(
    q: Any, first_head: int, caches: Any, scales: Any, blocks: Any, head: int, scores: Any, out: Any
) -> None:
    """Attend some query heads of `q, out [H, Dh]`, those of one key/value head, to cached tokens.

    `scores [G, S]` says how many heads and tokens; q is scaled.
    """
    keys, values = caches
    key_scales, value_scales = scales
    size = keys.shape[1]
    group, length = scores.shape
    for first in range(0, length, size):
        block = blocks[first // size]
        for offset in range(min(size, length - first)):
            key = keys[block, offset, head]
            factor = _half(key_scales[block, offset, head]) if key_scales.size else float32(1.0)
            for g in range(group):
                scores[g, first + offset] = factor * _dot(q[first_head + g], key)
    for g in range(group):
        scores[g] *= _softmax(scores[g])
        out[first_head + g] = 0.0
    for first in range(0, length, size):
        block = blocks[first // size]
        for offset in range(min(size, length - first)):
            value = values[block, offset, head]
            factor = _half(value_scales[block, offset, head]) if value_scales.size else float32(1.0)
            for g in range(group):
                _add_scaled(out[first_head + g], value, scores[g, first + offset] * factor)


@njit
def _are_there(blocks: Any, num_blocks: int) -> bool:
    """Say whether a cache of `num_blocks` has all of some blocks."""
    for block in blocks:
        if block < 0 or block >= num_blocks:
            return False
    return True


@njit
def _attend_pairs(tensors: Any, caches: Any, scales: Any, scale: Any, first: int, last: int) -> int:
    """Attend for the pairs first..last of a request with one new token and a key/value head.

    Returns the row of `table`, counted from 1, that names a block that is not there, or 0.
    """
    q, out, table, offsets, lengths = tensors
    num_blocks, size = caches[0].shape[0], caches[0].shape[1]
    num_heads = caches[0].shape[2]
    group = q.shape[1] // num_heads
    for pair in range(first, last):
        r, head = pair // num_heads, pair % num_heads
        t = offsets[r]
        if not _are_there(table[r, : (lengths[r] + size - 1) // size], num_blocks):
            return r + 1
        if offsets[r + 1] - t == 1:
            scores = np.empty((group, lengths[r]), np.float32)
            scaled = q[t] * scale
            _attend(scaled, head * group, caches, scales, table[r], head, scores, out[t])
    return 0


@compile_cached
def paged_attention_decode(plan_address: int, scale: float, first: int, last: int) -> None:
    """Attend for the pairs first..last of request and key/value head; others are left alone.

    The plan is int64: addresses of q `[T, H, Dh]` float32, the result, block_table `[R, width]`
    int32, keys and values `[num_blocks, block_size, Hk, Dh]`, and of their scales
    `[num_blocks, block_size, Hk]` float16 (int8 caches) or zeros (float32 ones); T, H, Dh, R,
    width, num_blocks, block_size, Hk; 0, see `FOUND_NO_BLOCK`; R + 1 offsets into q; R lengths.
    """
    head = carray(pointer(plan_address), PLAN_FIELDS, int64)
    T, H, Dh, R, width = head[7], head[8], head[9], head[10], head[11]
    scale_shape = (head[12], head[13], head[14])
    cache_shape = (head[12], head[13], head[14], Dh)
    plan = carray(pointer(plan_address), PLAN_FIELDS + 2 * R + 1, int64)
    tensors = (
        carray(pointer(head[0]), (T, H, Dh), float32),
        carray(pointer(head[1]), (T, H, Dh), float32),
        carray(pointer(head[2]), (R, width), int32),
        plan[PLAN_FIELDS : PLAN_FIELDS + R + 1],
        plan[PLAN_FIELDS + R + 1 :],
    )
    factor = float32(scale)
    if head[5]:
        codes = (
            carray(pointer(head[3]), cache_shape, int8),
            carray(pointer(head[4]), cache_shape, int8),
        )
        scales = (
            carray(pointer(head[5]), scale_shape, uint16),
            carray(pointer(head[6]), scale_shape, uint16),
        )
        wrong = _attend_pairs(tensors, codes, scales, factor, first, last)
    else:
        caches = (
            carray(pointer(head[3]), cache_shape, float32),
            carray(pointer(head[4]), cache_shape, float32),
        )
        nothing = np.empty((0, 0, 0), np.uint16)
        wrong = _attend_pairs(tensors, caches, (nothing, nothing), factor, first, last)
    if wrong:
        plan[FOUND_NO_BLOCK] = wrong
