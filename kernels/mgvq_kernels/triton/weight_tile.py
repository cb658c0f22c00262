"""The device function that decodes a tile of weights from blocks (called by decoding kernels).

It works for any bands and stages: the stage table is walked at run time, stages that do not meet
the tile are skipped, channels outside a stage's band are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgvq_kernels.block_order import STAGE_FIELDS as _STAGE_FIELDS

STAGE_FIELDS = tl.constexpr(_STAGE_FIELDS)


@triton.jit
def weight_tile(
    codes_ptr,
    books_ptr,
    book_scales_ptr,
    stages_ptr,
    stage_count,
    padded_rows,
    rows,  # [BLOCK_O] int64
    row_mask,  # [BLOCK_O]
    first_channel,  # scalar: permuted
    BLOCK_I: tl.constexpr,
):
    """Sum the stages of weights `[rows, first_channel ..]` in float32, row scales not applied."""
    channels = first_channel + tl.arange(0, BLOCK_I)
    row_place = (rows // 16) * 512 + rows % 16  # [BLOCK_O], within a block
    total = tl.zeros((row_mask.shape[0], BLOCK_I), tl.float32)
    for s in range(stage_count):
        fields = stages_ptr + s * STAGE_FIELDS
        start, groups = tl.load(fields + 4), tl.load(fields + 5)
        vector_dim = tl.load(fields + 2)
        if (start < first_channel + BLOCK_I) & (start + groups * vector_dim > first_channel):
            local = channels - start
            group = local // vector_dim
            inside = (local >= 0) & (group < groups)
            block = (tl.load(fields) + group // 32).to(tl.int64)
            place = block * padded_rows * 32 + (group % 32) * 16  # [BLOCK_I]
            mask = row_mask[:, None] & inside[None, :]
            code = tl.load(codes_ptr + place[None, :] + row_place[:, None], mask=mask, other=0)
            entry = code.to(tl.int32) * vector_dim + (local - group * vector_dim)[None, :]
            book = books_ptr + tl.load(fields + 3)
            weight = tl.load(book + entry, mask=mask, other=0).to(tl.float32)
            total += weight * tl.load(book_scales_ptr + s)
    return total
