"""The device function that decodes a tile of weights from the flat order (called by every kernel).

It works for any bands and stages: the schedule is walked at run time, channels outside a stage's
band are masked. Codes repeat within a vector, so that neighbouring lanes hit the same cache line.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_tile(
    codes_ptr,
    books_ptr,
    book_scales_ptr,
    schedule_ptr,
    stage_count,
    rows,  # [BLOCK_O] int64
    row_mask,  # [BLOCK_O]
    channels,  # [BLOCK_I] int32, permuted
    channel_mask,  # [BLOCK_I]
):
    """Sum the stages of weights `[rows, channels]` in float32, row scales not applied."""
    mask = row_mask[:, None] & channel_mask[None, :]
    total = tl.zeros(mask.shape, tl.float32)
    for s in range(stage_count):
        code_offset = tl.load(schedule_ptr + s * 5)
        groups = tl.load(schedule_ptr + s * 5 + 1)
        start = tl.load(schedule_ptr + s * 5 + 2).to(tl.int32)
        shift = tl.load(schedule_ptr + s * 5 + 3).to(tl.int32)
        book_offset = tl.load(schedule_ptr + s * 5 + 4)
        scale = tl.load(book_scales_ptr + s)
        local = channels - start
        group = local >> shift
        inside = mask & (local >= 0)[None, :] & (group < groups)[None, :]
        row_codes = codes_ptr + code_offset + rows * groups  # [BLOCK_O]
        code = tl.load(row_codes[:, None] + group[None, :], mask=inside, other=0).to(tl.int32)
        place = (code << shift) + (local - (group << shift))[None, :]
        entry = tl.load(books_ptr + book_offset + place, mask=inside, other=0)
        total += entry.to(tl.float32) * scale
    return total
