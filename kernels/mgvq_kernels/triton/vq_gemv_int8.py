"""A few rows rounded to int8 times a packed matrix, entry by entry (called by `ops.vq_linear`).

Each run of 128 channels of x gets a scale and becomes int8, once a token, in one launch that does
permutation, padding and SwiGLU too. A code then costs one read of its entry, four int8 in a word,
through L1, and one dp4a with the word of x. No table is built and no shared memory is used, so
programs are small; but reads conflict as codes have it, and x loses about 1 %: opt-in.

A dp4a that starts at the bits of 1.5 * 2^23 gives the bits of that float plus the sum: the
conversion costs an addition where I2F would run at a quarter of the rate. Sums are exact integers
before they meet a scale; splits are combined as in `vq_gemv`, in one order, whatever the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgvq_kernels.block_order import STAGE_FIELDS as _STAGE_FIELDS
from mgvq_kernels.block_order import padded_rows
from mgvq_kernels.layout import PackedVQ
from mgvq_kernels.triton.split_k import choose_splits, finish_tile, multiprocessors

STAGE_FIELDS = tl.constexpr(_STAGE_FIELDS)

TILE_ROWS = 256
"""Output rows of a program: two atoms a warp, whose loads are under way together."""

NUM_WARPS = 8

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs that run beside each other: 96 to 124 registers a thread (triton 3.9, 2026-11)."""

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a float below 2^22 it leaves the nearest integer in the low bits."""

ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def quantize_kernel(
    x_ptr,  # [T, I], or [T, 2 I] gate and up if SWIGLU
    sources_ptr,  # [blocks * DIMS * 32] int32
    bytes_ptr,  # [T, blocks, DIMS / 4, 32, 4] int8
    run_scales_ptr,  # [T, blocks * DIMS / 4] float32
    in_features,
    SWIGLU: tl.constexpr,
    DIMS: tl.constexpr,
):
    """bytes = round(x / scale) with scale = max |x| / 127 over a run of 128 channels."""
    # program (t, r) -> token t, the r-th run: 32 groups of a block, or 16 where DIMS is 8
    token, run, runs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block = run // (DIMS // 4)
    group = (run % (DIMS // 4)) * (128 // DIMS) + tl.arange(0, 128 // DIMS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    sources = tl.load(sources_ptr + (block * DIMS + dim) * 32 + group)
    present = sources >= 0
    x_ptr += token * (2 * in_features if SWIGLU else in_features)
    x = tl.load(x_ptr + sources, mask=present, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(x_ptr + in_features + sources, mask=present, other=0.0).to(tl.float32)
        x = (x * tl.sigmoid(x) * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    top = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    spoilt = tl.sum(tl.sum(x * 0.0, axis=1), axis=0)  # NaN where x is not finite: max drops NaN
    inverse = tl.where(top > 0, tl.div_rn(127.0, tl.where(top > 0, top, 1.0)), 0.0)
    rounded = (x * inverse + ROUNDER) - ROUNDER
    rounded = tl.where(tl.abs(rounded) <= 127.0, rounded, 0.0)  # no integer is NaN: scales are
    place = ((block * (DIMS // 4) + dim // 4) * 32 + group) * 4 + dim % 4
    tl.store(bytes_ptr + token * runs * 128 + place, rounded.to(tl.int8))
    tl.store(run_scales_ptr + token * runs + run, tl.div_rn(top, 127.0) + spoilt)


@triton.jit
def dot_bytes(a, b, start, INTERPRET: tl.constexpr):
    """start + the sum of the products of four int8 in each int32 of a and b: one instruction.

    The interpreter has no assembly: there the products are written out.
    """
    if INTERPRET:
        total = start + ((a << 24) >> 24) * ((b << 24) >> 24)
        total += ((a << 16) >> 24) * ((b << 16) >> 24)
        total += ((a << 8) >> 24) * ((b << 8) >> 24)
        total += (a >> 24) * (b >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, start],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return total


@triton.jit
def dot_block(codes, words_ptr, x_words_ptr, DIMS: tl.constexpr, INTERPRET: tl.constexpr):
    """Multiply the entries of `codes [A, 32, 16]` by the words of their groups: exact float32."""
    words = tl.load(words_ptr + codes.to(tl.int32))
    x_words_ptr += tl.arange(0, 32)
    x = tl.broadcast_to(tl.load(x_words_ptr)[None, :, None], codes.shape)
    start = tl.full(codes.shape, ROUNDER_BITS, tl.int32)
    sums = dot_bytes(words.to(tl.int32), x, start, INTERPRET)
    if DIMS == 8:
        x = tl.broadcast_to(tl.load(x_words_ptr + 32)[None, :, None], codes.shape)
        sums = dot_bytes((words >> 32).to(tl.int32), x, sums, INTERPRET)
    return sums.to(tl.float32, bitcast=True) - ROUNDER


@triton.jit
def vq_gemv_int8_kernel(
    x_words_ptr,  # [T, blocks, DIMS / 4, 32] int32
    run_scales_ptr,  # [T, blocks * DIMS / 4] float32
    codes_ptr,  # blocks of uint8
    words_ptr,  # [M, 256] int32 or int64: an entry's bytes
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    stages_ptr,  # [M, STAGE_FIELDS] int32
    counters_ptr,  # [T * tiles] int32, zero
    bias_ptr,  # [O]
    residual_ptr,  # [T, O]
    partials_ptr,  # [splits, T, padded_rows] float32
    y_ptr,  # [T, O]
    token_count,
    out_features,
    padded_rows,
    stage_count,
    block_count,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o] + residual[t, o]."""
    # program (t, p, k) -> row t of x, outputs p * ROWS .., the k-th share of the blocks
    token, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    atom, row = tl.arange(0, ROWS // 16), tl.arange(0, 16)
    group = tl.arange(0, 32)
    places = atom[:, None, None] * 512 + group[None, :, None] * 16 + row[None, None, :]
    block_bytes = tl.multiple_of(padded_rows.to(tl.int64) * 32, 16)
    codes_ptr += tile.to(tl.int64) * (ROWS * 32)
    x_words_ptr += token.to(tl.int64) * block_count * (DIMS * 8)
    run_scales_ptr += token * block_count * (DIMS // 4) + group // (128 // DIMS)
    begin, end = split * block_count // splits, (split + 1) * block_count // splits
    totals = tl.zeros((ROWS // 16, 32, 16), tl.float32)
    for s in range(stage_count):
        first_block = tl.load(stages_ptr + s * STAGE_FIELDS)
        low = tl.maximum(begin, first_block)
        high = tl.minimum(end, first_block + tl.load(stages_ptr + s * STAGE_FIELDS + 1))
        if low < high:
            book_scale = tl.load(book_scales_ptr + s)
            codes_next = tl.load(codes_ptr + low * block_bytes + places)
            for block in range(low, high):
                codes = codes_next
                codes_next = tl.load(  # under way while this block is summed
                    codes_ptr + tl.minimum(block + 1, high - 1) * block_bytes + places
                )
                sums = dot_block(
                    codes, words_ptr + s * 256, x_words_ptr + block * (DIMS * 8), DIMS, INTERPRET
                )
                scale = tl.load(run_scales_ptr + block * (DIMS // 4)) * book_scale
                totals += sums * scale[None, :, None]
    total = tl.reshape(tl.sum(totals, axis=1), (ROWS, 1))  # over the lanes
    finish_tile(
        y_ptr, partials_ptr, counters_ptr + token * tl.num_programs(1) + tile, scales_ptr,
        bias_ptr, residual_ptr, total, tile * ROWS + tl.arange(0, ROWS), token + tl.arange(0, 1),
        split, splits, token_count, out_features, padded_rows, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@torch.library.custom_op("mgvq::triton_vq_gemv_int8", mutates_args=())
def triton_vq_gemv_int8(
    x: Tensor,
    codes: Tensor,
    word_books: Tensor,
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
    """Launch both kernels on 1 to 4 rows `x [T, I]` or, gated, `[T, 2 I]`: `[T, O]`.

    The other tensors are a `PackedVQ`'s. `counters` ends as it began, so two streams must not run
    one weight at a time.
    """
    tokens, out_features = x.shape[0], scales.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    padded, dims = padded_rows(out_features), word_books.shape[2]
    partials = torch.empty(splits, tokens, padded, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        x_words, run_scales = quantize(x, sources, in_features, dims)
        vq_gemv_int8_kernel[(tokens, padded // TILE_ROWS, splits)](
            x_words,
            run_scales,
            codes,
            word_books.view(torch.int32 if dims == 4 else torch.int64),
            codebook_scales,
            scales,
            stages,
            counters,
            scales if bias is None else bias,
            x if residual is None else residual,
            partials,
            y,
            tokens,
            out_features,
            padded,
            stages.shape[0],
            codes.shape[0] // (padded * 32),
            splits,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            DIMS=dims,
            ROWS=TILE_ROWS,
            INTERPRET=triton.knobs.runtime.interpret,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return y


@triton_vq_gemv_int8.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    word_books: Tensor,
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


def quantize(x: Tensor, sources: Tensor, in_features: int, dims: int) -> tuple[Tensor, Tensor]:
    """Round `x [T, I]`, or the product of gate and up `[T, 2 I]`, to int8.

    Returns:
        Words of four int8 `[T, blocks * dims * 8]` int32 in the order of the groups, and scales
        `[T, blocks * dims / 4]` float32.
    """
    tokens, runs = x.shape[0], sources.shape[0] // 128
    words = torch.empty(tokens, runs * 32, dtype=torch.int32, device=x.device)
    run_scales = torch.empty(tokens, runs, dtype=torch.float32, device=x.device)
    quantize_kernel[(tokens, runs)](
        x,
        sources,
        words.view(torch.int8),
        run_scales,
        in_features,
        SWIGLU=x.shape[1] != in_features,
        DIMS=dims,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return words, run_scales


def linear(x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Multiply 1 to 4 rows `x [..., I]`, or gate and up `[..., 2 I]`, in int8: `[..., O]`."""
    tensors, layout = weight.tensors, weight.layout
    padded = padded_rows(layout.out_features)
    blocks = tensors["codes"].shape[0] // (padded * 32)
    slots = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(weight.device)
    y = triton_vq_gemv_int8(
        x.reshape(-1, x.shape[-1]).contiguous(),
        tensors["codes"],
        tensors["word_books"],
        tensors["codebook_scales"],
        tensors["scales"],
        tensors["stages"],
        tensors["sources"],
        tensors["counters"],
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.reshape(-1, layout.out_features).contiguous(),
        layout.in_features,
        choose_splits(padded // TILE_ROWS, blocks, slots),
    )
    return y.view(*x.shape[:-1], layout.out_features)
