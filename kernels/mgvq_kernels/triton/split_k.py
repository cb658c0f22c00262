"""How a linear is split and how its splits end: combine, scale, add, store (for GEMV and GEMM).

The blocks of a matrix are dealt to `splits` programs a tile. Each leaves its sums in a slot of its
own; the last one to arrive adds the slots in slot order, so that the result does not depend on who
was last. The only atomic is an integer counter, which goes back to zero: graphs may replay.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

PROGRAM_BLOCKS = 3
"""What a program costs beside its blocks, in blocks: codebook, first loads, last sums. By the
instructions of the machine code; no GPU has measured it."""

MOST_SPLITS = 32
"""Slots the last program adds at most, one after the other."""


def choose_splits(tiles: int, blocks: int, slots: int) -> int:
    """Choose into how many shares the blocks of every tile are cut.

    Balances whole waves of programs against what each program costs beside its blocks; depends on
    shape and GPU alone, never on the number of tokens, so that sums are always taken in one order.

    Args:
        tiles: tiles of output rows.
        blocks: blocks a tile.
        slots: programs that run at once.

    Returns:
        At least 1, at most `blocks`.
    """

    def cost(splits: int) -> int:
        waves = -(-tiles * splits // slots)
        return waves * (-(-blocks // splits) + PROGRAM_BLOCKS)

    return min(range(1, min(blocks, MOST_SPLITS) + 1), key=cost)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; one where kernels are interpreted on a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def finish_tile(
    y_ptr,
    partials_ptr,  # [splits, T, padded_rows] float32
    counter_ptr,  # of this tile
    scales_ptr,
    bias_ptr,
    residual_ptr,
    total,  # [R, C] float32: this split's sums
    rows,  # [R]
    tokens,  # [C]
    split,
    splits,
    token_count,
    out_features,
    padded_rows,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Store the outputs of a tile, or leave this split's sums unless it is the last to arrive."""
    if splits == 1:
        store_outputs(
            y_ptr, total, scales_ptr, bias_ptr, residual_ptr, rows, tokens, token_count,
            out_features, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        store_partial(partials_ptr, total, split, rows, tokens, token_count, padded_rows)
        if arrive_last(counter_ptr, splits):
            whole = sum_partials(partials_ptr, splits, rows, tokens, token_count, padded_rows)
            store_outputs(
                y_ptr, whole, scales_ptr, bias_ptr, residual_ptr, rows, tokens, token_count,
                out_features, HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip


@triton.jit
def arrive_last(counter_ptr, splits):
    """Count this program in, its stores made visible; true for the last of `splits`."""
    tl.debug_barrier()  # the atomic is one thread's: the others must have stored before it
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def store_partial(partials_ptr, total, split, rows, tokens, token_count, padded_rows):
    """Leave the sums `total [R, C]` in this split's slot."""
    slots = split * token_count + tokens  # [C]
    place = slots.to(tl.int64)[None, :] * padded_rows + rows[:, None]
    tl.store(partials_ptr + place, total, mask=(tokens < token_count)[None, :])


@triton.jit
def sum_partials(partials_ptr, splits, rows, tokens, token_count, padded_rows):
    """Add the slots of all splits in order: `[R, C]` float32."""
    total = tl.zeros((rows.shape[0], tokens.shape[0]), tl.float32)
    mask = (tokens < token_count)[None, :]
    for split in range(splits):
        place = (split * token_count + tokens).to(tl.int64)[None, :] * padded_rows + rows[:, None]
        # .cg: another multiprocessor wrote it, this one's L1 knows nothing of that.
        total += tl.load(partials_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_outputs(
    y_ptr,
    total,  # [R, C] float32
    scales_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    tokens,
    token_count,
    out_features,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """y[t, o] = total * scales[o] + bias[o] + residual[t, o]."""
    row_mask = rows < out_features
    y = total * tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    place = tokens.to(tl.int64)[None, :] * out_features + rows[:, None]
    mask = (tokens < token_count)[None, :] & row_mask[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
