"""A few rows times a trellis, straight from its codes (called by `ops.vq_linear`).

A program holds the codebook as a float32 table of 4096 entries and decodes a tile of 256 rows block
by block of 128 channels; each weight meets up to four rows of x while it is in a register, for
decoding is what takes the time. Permutation, bias and residual are done on the way; SwiGLU is a
launch of its own, as 16 threads would each do it again.

A launch for each rate among the bands: code for four rates in one kernel takes 20 to 80 s to
compile. Their splits are combined as in `vq_gemv`, in one order, by whoever comes last in the last
launch. A row's sums depend neither on the rows beside it nor on their number. Takes half precision;
registered with torch.library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.trellis_order import BAND_FIELDS as _BAND_FIELDS
from mgvq_kernels.trellis_order import BLOCK_GROUPS as _BLOCK_GROUPS
from mgvq_kernels.trellis_order import padded_rows, rate_blocks
from mgvq_kernels.triton import row_ops
from mgvq_kernels.triton.split_k import choose_splits, finish_tile, multiprocessors
from mgvq_kernels.triton.trellis_tile import (
    TILE_ROWS,
    UNIT_ROWS,
    UNITS,
    load_table,
    load_words,
    look_up,
    place_band,
    zeroed_after_error,
)

BAND_FIELDS = tl.constexpr(_BAND_FIELDS)
BLOCK_GROUPS = tl.constexpr(_BLOCK_GROUPS)

NUM_WARPS = 8

THREAD_WEIGHTS = TILE_ROWS.value * _BLOCK_GROUPS * 8 // (32 * NUM_WARPS)
"""Weights a thread decodes of a block: 128, whose reads of the table are under way together."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs that run beside each other on one row of x: at most 128 registers a thread."""

MOST_TOKENS = 4
"""Rows of one launch: their sums stay in registers."""


@triton.jit
def add_products(
    totals,  # TOKENS of [BLOCK_GROUPS, UNITS, UNIT_ROWS] float32
    weights,  # [BLOCK_GROUPS, UNITS, UNIT_ROWS, WIDTH]
    x_ptr,  # at the first token's row
    permutation_ptr,
    channel,  # [BLOCK_GROUPS]: permuted, of the first weight; the others are STEP apart
    present,
    last_token,
    in_features,
    HAS_PERMUTATION: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the products of a block's weights and each token's activations to its totals.

    One fused multiply-add a weight and token, always in the same order. A thread loads the
    activations of its own group: they change hands nowhere.
    """
    if WIDTH == 1:
        source = channel
        if HAS_PERMUTATION:
            source = tl.load(permutation_ptr + channel, mask=present, other=0)
        for t in tl.static_range(TOKENS):
            row_ptr = x_ptr + tl.minimum(t, last_token) * in_features
            x = tl.load(row_ptr + source, mask=present, other=0.0).to(tl.float32)
            x = tl.broadcast_to(x[:, None, None], weights.shape)
            totals = totals[1:] + (tl.fma(weights, x, totals[0]),)  # all around, in the end
    else:
        HALF: tl.constexpr = WIDTH // 2
        if WIDTH > 2:
            weights = tl.reshape(weights, (BLOCK_GROUPS, UNITS, UNIT_ROWS, HALF, 2))
        even, odd = tl.split(weights)
        totals = add_products(
            totals, even, x_ptr, permutation_ptr, channel, present, last_token, in_features,
            HAS_PERMUTATION, TOKENS, HALF, 2 * STEP,
        )  # fmt: skip
        totals = add_products(
            totals, odd, x_ptr, permutation_ptr, channel + STEP, present, last_token, in_features,
            HAS_PERMUTATION, TOKENS, HALF, 2 * STEP,
        )  # fmt: skip
    return totals


@triton.jit
def sum_groups(totals, FIRST: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr):
    """Sum the groups of every STRIDE-th token from FIRST on: `[TILE_ROWS, TOKENS / STRIDE]`."""
    if STRIDE == TOKENS:
        sums = tl.reshape(tl.sum(totals[FIRST], axis=0), (TILE_ROWS, 1))
    else:
        even = sum_groups(totals, FIRST, 2 * STRIDE, TOKENS)
        odd = sum_groups(totals, FIRST + STRIDE, 2 * STRIDE, TOKENS)
        sums = tl.reshape(tl.join(even, odd), (TILE_ROWS, TOKENS // STRIDE))
    return sums


@triton.jit
def trellis_gemv_kernel(
    x_ptr,  # [T, I]
    codes_ptr,  # tiles of int32
    halos_ptr,  # int32
    books_ptr,  # flat int8
    book_scales_ptr,  # [B] float32
    scales_ptr,  # [O] float16
    bands_ptr,  # [B, BAND_FIELDS] int32
    permutation_ptr,  # [I] int32
    counters_ptr,  # [tiles] int32, zero before the first launch
    bias_ptr,  # [O]
    residual_ptr,  # [T, O]
    partials_ptr,  # [splits, T, padded_rows] float32
    y_ptr,  # [T, O]
    token_count,
    out_features,
    in_features,
    padded_rows,
    band_count,
    block_count,  # of the bands of this rate
    first_split,  # of this launch
    splits,  # of all launches
    HAS_PERMUTATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RATE: tl.constexpr,
    TOKENS: tl.constexpr,  # T at most
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o] + residual[t, o]."""
    # program (p, k) -> outputs p * TILE_ROWS .., the k-th share of the blocks of this rate
    tile, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = share * block_count // shares, (share + 1) * block_count // shares
    totals = (tl.zeros((BLOCK_GROUPS, UNITS, UNIT_ROWS), tl.float32),) * TOKENS
    for b in range(band_count):
        fields_ptr = bands_ptr + b * BAND_FIELDS
        first_block = tl.load(fields_ptr)
        low = tl.maximum(begin - first_block, 0)
        high = tl.minimum(end - first_block, tl.load(fields_ptr + 1))
        if (tl.load(fields_ptr + 2) == RATE) & (low < high):
            word, halo, start, groups = place_band(fields_ptr, tile, RATE)
            table = load_table(books_ptr, book_scales_ptr + b, fields_ptr)
            for block in range(low, high):
                first_group = block * BLOCK_GROUPS
                words = load_words(
                    codes_ptr + word, halos_ptr + halo, first_group, groups, RATE, BLOCK_GROUPS
                )
                group = first_group + tl.arange(0, BLOCK_GROUPS)
                totals = add_products(
                    totals, look_up(table, words, RATE, BLOCK_GROUPS), x_ptr, permutation_ptr,
                    start + group * 8, group < groups, token_count - 1, in_features,
                    HAS_PERMUTATION, TOKENS, 8, 1,
                )  # fmt: skip
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    finish_tile(
        y_ptr, partials_ptr, counters_ptr + tile, scales_ptr, bias_ptr, residual_ptr,
        sum_groups(totals, 0, 1, TOKENS), rows, tl.arange(0, TOKENS), first_split + share, splits,
        token_count, out_features, padded_rows, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@torch.library.custom_op("mgvq::triton_trellis_gemv", mutates_args=())
def triton_trellis_gemv(
    x: Tensor,
    codes: Tensor,
    halos: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    bands: Tensor,
    permutation: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rates: Sequence[int],
    blocks: Sequence[int],
    splits: Sequence[int],
) -> Tensor:
    """Launch the kernel for each rate on at most `MOST_TOKENS` rows `x [T, I]`: `[T, O]`.

    The other tensors are a `PackedVQ`'s; `blocks` and `splits` count those of each of `rates`.
    `counters` ends as it began, so two streams must not run one weight at a time.
    """
    (tokens, in_features), out_features = x.shape, scales.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    padded = padded_rows(out_features)
    partials = torch.empty(sum(splits), tokens, padded, dtype=torch.float32, device=x.device)
    first_split = 0
    with torch.cuda.device_of(x), zeroed_after_error(counters):
        for rate, block_count, shares in zip(rates, blocks, splits, strict=True):
            trellis_gemv_kernel[(counters.shape[0], shares)](
                x,
                codes.view(torch.int32),
                halos,
                codebooks,
                codebook_scales,
                scales,
                bands,
                bands if permutation is None else permutation,
                counters,
                scales if bias is None else bias,
                x if residual is None else residual,
                partials,
                y,
                tokens,
                out_features,
                in_features,
                padded,
                bands.shape[0],
                block_count,
                first_split,
                sum(splits),
                HAS_PERMUTATION=permutation is not None,
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None,
                RATE=rate,
                TOKENS=triton.next_power_of_2(tokens),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
            first_split += shares
    return y


@triton_trellis_gemv.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    halos: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    bands: Tensor,
    permutation: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rates: Sequence[int],
    blocks: Sequence[int],
    splits: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def linear(x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Multiply `x [..., I]`, or gate and up `[..., 2 I]`, straight from codes: `[..., O]`.

    More than `MOST_TOKENS` rows take a launch for each so many.
    """
    tensors, layout = weight.tensors, weight.layout
    if x.shape[-1] != layout.in_features:
        x = row_ops.swiglu(x)
    blocks = rate_blocks((band.width, band.rate) for band in layout.bands)
    tiles = tensors["counters"].shape[0]
    slots = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(weight.device)
    rows = x.reshape(-1, layout.in_features).contiguous()  # [T, I]
    added = None if residual is None else residual.reshape(-1, layout.out_features).contiguous()
    parts = [
        triton_trellis_gemv(
            rows[first : first + MOST_TOKENS],
            tensors["codes"],
            tensors["halos"],
            tensors["codebooks"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["bands"],
            tensors.get("permutation"),
            tensors["counters"],
            None if bias is None else bias.contiguous(),
            None if added is None else added[first : first + MOST_TOKENS],
            list(blocks),
            list(blocks.values()),
            [choose_splits(tiles, count, slots) for count in blocks.values()],
        )
        for first in range(0, rows.shape[0], MOST_TOKENS)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat([rows.new_empty(0, layout.out_features), *parts])
    return y.view(*x.shape[:-1], layout.out_features)
