"""A few rows times a packed matrix by tables of partial sums (called by `ops.vq_linear`).

For each block of 32 groups the tensor cores multiply the codebook by the activations: what every
codeword would add, for every group. A code then costs one read of that table in shared memory and
one multiply-add. The table is float32 and codebook entries are exact in half precision, so nothing
is lost. Lane and group agree (`block_order`), so reads never conflict, whatever the codes are.

The codebook comes block-diagonal, `[256 * 4, 4 * DIMS]`: its four slices serve 8 groups each, and
the product `[256 * 4, 8]` is the table in the order that is read. A tile of it then lies in
consecutive banks, where a product `[256, 32]` would be written with 4-way conflicts.

One launch a linear, for all bands and stages. A row's result depends neither on the rows beside it
nor on their number. Takes half precision; registered with torch.library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.block_order import LEAST_TILE, padded_rows
from mgvq_kernels.block_order import STAGE_FIELDS as _STAGE_FIELDS
from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.split_k import choose_splits, finish_tile, multiprocessors
from mgvq_kernels.tuned import launch_options

STAGE_FIELDS = tl.constexpr(_STAGE_FIELDS)

TILE_ROWS = {4: 512, 8: 256}
"""Output rows of a program by DIMS: in both cases one table serves 65536 weights."""

NUM_WARPS = 16
"""At most 128 registers a thread, no spill on sm_80 to sm_90. 8 warps of the same tile take
over 220, and 512 rows spill where DIMS is 8 (triton 3.9, 2026-11)."""

MOST_TOKENS = TILE_ROWS[8] // LEAST_TILE
"""Rows of one launch: as many as there are counters a tile."""


@triton.jit
def load_block(
    x_ptr,  # at the token's row
    codes_ptr,  # at the tile's rows
    sources_ptr,
    places,  # [ROWS * 32]: of codes in the tile
    block,
    block_bytes,
    in_features,
    DIMS: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Load the codes `[ROWS * 32]` of a block and the activations `[4 * DIMS, 8]` of its groups."""
    codes = tl.load(codes_ptr + block * block_bytes + places, eviction_policy="evict_first")
    k, column = tl.arange(0, 4 * DIMS)[:, None], tl.arange(0, 8)[None, :]
    place = (block * DIMS + k % DIMS) * 32 + (k // DIMS) * 8 + column
    sources = tl.load(sources_ptr + place)
    present = sources >= 0
    x = tl.load(x_ptr + sources, mask=present, other=0.0)
    if SWIGLU:
        up = tl.load(x_ptr + in_features + sources, mask=present, other=0.0).to(tl.float32)
        gate = x.to(tl.float32)
        x = (gate * tl.sigmoid(gate) * up).to(x_ptr.dtype.element_ty)
    return codes, x


@triton.jit
def sum_blocks(
    x_ptr,  # at the token's row
    codes_ptr,  # at the tile's rows
    diagonal_books_ptr,
    book_scales_ptr,
    stages_ptr,
    sources_ptr,
    begin,
    end,
    in_features,
    padded_rows,
    stage_count,
    SWIGLU: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum what the blocks begin..end add to each row, group by group: `[ROWS * 32]` float32."""
    places = tl.arange(0, ROWS * 32)  # atom * 512 + group * 16 + row
    group = (places // 16) % 32
    block_bytes = tl.multiple_of(padded_rows.to(tl.int64) * 32, 16)
    entries = tl.arange(0, 1024)[:, None] * (4 * DIMS) + tl.arange(0, 4 * DIMS)[None, :]
    totals = tl.zeros((ROWS * 32,), tl.float32)
    for s in range(stage_count):
        first_block = tl.load(stages_ptr + s * STAGE_FIELDS)
        low = tl.maximum(begin, first_block)
        high = tl.minimum(end, first_block + tl.load(stages_ptr + s * STAGE_FIELDS + 1))
        if low < high:
            book = tl.load(diagonal_books_ptr + s * (1024 * 4 * DIMS) + entries)
            book = book.to(x_ptr.dtype.element_ty)  # exact
            book_scale = tl.load(book_scales_ptr + s)
            codes_next, x_next = load_block(
                x_ptr, codes_ptr, sources_ptr, places, low, block_bytes, in_features, DIMS, SWIGLU
            )
            for block in range(low, high):
                codes, x = codes_next, x_next
                codes_next, x_next = load_block(  # under way while this block is summed
                    x_ptr, codes_ptr, sources_ptr, places, tl.minimum(block + 1, high - 1),
                    block_bytes, in_features, DIMS, SWIGLU,
                )  # fmt: skip
                table = tl.reshape(tl.dot(book, x), (256 * 32,))
                found = tl.gather(table, (codes.to(tl.int32) << 5) | group, 0)
                totals += found * book_scale
    return totals


@triton.jit
def vq_gemv_kernel(
    x_ptr,  # [T, I], or [T, 2 I] gate and up if SWIGLU
    codes_ptr,  # blocks of uint8
    diagonal_books_ptr,  # [M, 1024, 4 * DIMS] int8
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    stages_ptr,  # [M, STAGE_FIELDS] int32
    sources_ptr,  # [blocks * DIMS * 32] int32
    counters_ptr,  # [T * tiles] int32, zero
    bias_ptr,  # [O]
    residual_ptr,  # [T, O]
    partials_ptr,  # [splits, T, padded_rows] float32
    y_ptr,  # [T, O]
    token_count,
    out_features,
    in_features,
    padded_rows,
    stage_count,
    block_count,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    DIMS: tl.constexpr,  # 4 or 8: no vector dimension is larger
    ROWS: tl.constexpr,
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o] + residual[t, o]."""
    # program (t, p, k) -> row t of x, outputs p * ROWS .., the k-th share of the blocks
    token, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    totals = sum_blocks(
        x_ptr + token.to(tl.int64) * (2 * in_features if SWIGLU else in_features),
        codes_ptr + tile.to(tl.int64) * (ROWS * 32),
        diagonal_books_ptr, book_scales_ptr, stages_ptr, sources_ptr,
        split * block_count // splits, (split + 1) * block_count // splits,
        in_features, padded_rows, stage_count, SWIGLU, DIMS, ROWS,
    )  # fmt: skip
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = token + tl.arange(0, 1)
    total = tl.sum(tl.reshape(totals, (ROWS // 16, 32, 16)), axis=1)  # over the lanes
    total = tl.reshape(total, (ROWS, 1))
    finish_tile(
        y_ptr, partials_ptr, counters_ptr + token * tl.num_programs(1) + tile, scales_ptr,
        bias_ptr, residual_ptr, total, rows, tokens, split, splits, token_count, out_features,
        padded_rows, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@torch.library.custom_op("mgvq::triton_vq_gemv", mutates_args=())
def triton_vq_gemv(
    x: Tensor,
    codes: Tensor,
    diagonal_books: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    stages: Tensor,
    sources: Tensor,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    splits: int,
) -> Tensor:
    """Launch the kernel on at most `MOST_TOKENS` rows `x [T, I]` or, gated, `[T, 2 I]`: `[T, O]`.

    The other tensors are a `PackedVQ`'s. `counters` ends as it began, so two streams must not run
    one weight at a time.
    """
    tokens, out_features = x.shape[0], scales.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    padded, dims = padded_rows(out_features), diagonal_books.shape[2] // 4
    partials = torch.empty(splits, tokens, padded, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        vq_gemv_kernel[(tokens, padded // TILE_ROWS[dims], splits)](
            x,
            codes,
            diagonal_books,
            codebook_scales,
            scales,
            stages,
            sources,
            counters,
            scales if bias is None else bias,
            x if residual is None else residual,
            partials,
            y,
            tokens,
            out_features,
            in_features,
            padded,
            stages.shape[0],
            codes.shape[0] // (padded * 32),
            splits,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            SWIGLU=x.shape[1] != in_features,
            DIMS=dims,
            ROWS=TILE_ROWS[dims],
            **launch_options(x.device, f"vq_gemv-d{dims}", num_warps=NUM_WARPS),
            enable_fp_fusion=True,
        )
    return y


@triton_vq_gemv.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    diagonal_books: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    stages: Tensor,
    sources: Tensor,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    splits: int,
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def linear(x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Multiply `x [..., I]`, or gate and up `[..., 2 I]`, straight from codes: `[..., O]`.

    More than `MOST_TOKENS` rows take a launch for each so many.
    """
    tensors, layout = weight.tensors, weight.layout
    padded = padded_rows(layout.out_features)
    blocks = tensors["codes"].shape[0] // (padded * 32)
    tiles = padded // TILE_ROWS[tensors["word_books"].shape[2]]
    splits = choose_splits(tiles, blocks, multiprocessors(weight.device))
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [T, I] or [T, 2 I]
    added = None if residual is None else residual.reshape(-1, layout.out_features).contiguous()
    parts = [
        triton_vq_gemv(
            rows[first : first + MOST_TOKENS],
            tensors["codes"],
            tensors["diagonal_books"],
            tensors["codebook_scales"],
            tensors["scales"],
            tensors["stages"],
            tensors["sources"],
            tensors["counters"],
            None if bias is None else bias.contiguous(),
            None if added is None else added[first : first + MOST_TOKENS],
            layout.in_features,
            splits,
        )
        for first in range(0, rows.shape[0], MOST_TOKENS)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat([rows.new_empty(0, layout.out_features), *parts])
    return y.view(*x.shape[:-1], layout.out_features)
