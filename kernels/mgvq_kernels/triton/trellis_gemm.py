"""Five to 64 rows times a trellis on the tensor cores (called by `ops.vq_linear`).

A program decodes a tile of 256 rows, 32 or 64 channels at a time, turns it in shared memory and
multiplies it by all rows of x: each weight is decoded once. Weights are codebook entries, exact in
half precision; sums are float32 and take a band's scale when the band is done. Permutation and
SwiGLU are done before, by the launch that arranges x for the GEMM of lookups. A launch for each
rate, and splits that are combined in one order, as in `trellis_gemv`. Takes half precision;
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
    load_entries,
    load_words,
    look_up_rows,
    place_band,
    zeroed_after_error,
)
from mgvq_kernels.triton.vq_gemm import TILE_TOKENS, arrange

BAND_FIELDS = tl.constexpr(_BAND_FIELDS)
BLOCK_GROUPS = tl.constexpr(_BLOCK_GROUPS)

NUM_WARPS = 8

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs that run beside each other by registers, up to 16 rows of x; of more, one."""


def step_groups(tokens: int) -> int:
    """Return the groups decoded at once, 8 weights of each a thread.

    Where sums leave room for a second program, half as many, so that it has room: 124 registers a
    thread against 176, at 7.1 instructions a weight against 5.7 (16 rows, 2 bits, sm_86; triton
    3.9, 2026-11; counted, not timed). Where sums take most registers too: more would spill.
    """
    return 8 if tokens == TILE_TOKENS[1] else 4


@triton.jit
def trellis_gemm_kernel(
    x_ptr,  # [T, I], channels as stored
    codes_ptr,  # tiles of int32
    halos_ptr,  # int32
    books_ptr,  # flat int8
    book_scales_ptr,  # [B] float32
    scales_ptr,  # [O] float16
    bands_ptr,  # [B, BAND_FIELDS] int32
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RATE: tl.constexpr,
    TOKENS: tl.constexpr,  # T at most
    GROUPS: tl.constexpr,  # decoded at once
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o] + residual[t, o]."""
    # program (p, k) -> outputs p * TILE_ROWS .., the k-th share of the blocks of this rate
    tile, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = share * block_count // shares, (share + 1) * block_count // shares
    tokens, channel = tl.arange(0, TOKENS), tl.arange(0, GROUPS * 8)
    kept = tl.minimum(tokens, token_count - 1)  # one too many is not stored
    x_places = (
        x_ptr + kept.to(tl.int64)[None, :] * in_features + channel[:, None]
    )  # [8 GROUPS, TOKENS]
    total = tl.zeros((TILE_ROWS, TOKENS), tl.float32)
    for b in range(band_count):
        fields_ptr = bands_ptr + b * BAND_FIELDS
        first_block = tl.load(fields_ptr)
        low = tl.maximum(begin - first_block, 0)
        high = tl.minimum(end - first_block, tl.load(fields_ptr + 1))
        if (tl.load(fields_ptr + 2) == RATE) & (low < high):
            word, halo, start, groups = place_band(fields_ptr, tile, RATE)
            start = tl.multiple_of(start, 8)
            table = load_entries(books_ptr, fields_ptr).to(x_ptr.dtype.element_ty)  # exact
            band_total = tl.zeros((TILE_ROWS, TOKENS), tl.float32)
            last = tl.minimum(high * BLOCK_GROUPS, groups)
            for group in range(low * BLOCK_GROUPS, last, GROUPS):
                words = load_words(codes_ptr + word, halos_ptr + halo, group, groups, RATE, GROUPS)
                weights = look_up_rows(table, words, RATE, GROUPS)
                present = (channel < (groups - group) * 8)[:, None]
                x = tl.load(x_places + (start + group * 8), mask=present, other=0.0)
                band_total = tl.dot(weights, x, band_total)
            total += band_total * tl.load(book_scales_ptr + b)
    finish_tile(
        y_ptr, partials_ptr, counters_ptr + tile, scales_ptr, bias_ptr, residual_ptr, total,
        tile * TILE_ROWS + tl.arange(0, TILE_ROWS), tokens, first_split + share, splits,
        token_count, out_features, padded_rows, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@torch.library.custom_op("mgvq::triton_trellis_gemm", mutates_args=())
def triton_trellis_gemm(
    x: Tensor,
    codes: Tensor,
    halos: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    bands: Tensor,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rates: Sequence[int],
    blocks: Sequence[int],
    splits: Sequence[int],
) -> Tensor:
    """Launch the kernel for each rate on 1 to 64 rows `x [T, I]`, channels as stored: `[T, O]`.

    The other tensors are a `PackedVQ`'s; `blocks` and `splits` count those of each of `rates`.
    `counters` ends as it began, so two streams must not run one weight at a time.
    """
    (tokens, in_features), out_features = x.shape, scales.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    padded = padded_rows(out_features)
    partials = torch.empty(sum(splits), tokens, padded, dtype=torch.float32, device=x.device)
    tile_tokens, first_split = next(most for most in TILE_TOKENS if tokens <= most), 0
    with torch.cuda.device_of(x), zeroed_after_error(counters):
        for rate, block_count, shares in zip(rates, blocks, splits, strict=True):
            trellis_gemm_kernel[(counters.shape[0], shares)](
                x,
                codes.view(torch.int32),
                halos,
                codebooks,
                codebook_scales,
                scales,
                bands,
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
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None,
                RATE=rate,
                TOKENS=tile_tokens,
                GROUPS=step_groups(tile_tokens),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
            first_split += shares
    return y


@triton_trellis_gemm.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    halos: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor,
    scales: Tensor,
    bands: Tensor,
    counters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rates: Sequence[int],
    blocks: Sequence[int],
    splits: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def linear(x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Multiply 1 to 64 rows `x [..., I]`, or gate and up `[..., 2 I]`, by a weight: `[..., O]`."""
    tensors, layout = weight.tensors, weight.layout
    rows = x.reshape(-1, x.shape[-1])
    if (permutation := tensors.get("permutation")) is not None:
        rows = arrange(rows.contiguous(), permutation, layout.in_features)
    elif rows.shape[1] != layout.in_features:
        rows = row_ops.swiglu(rows)
    blocks = rate_blocks((band.width, band.rate) for band in layout.bands)
    slots = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(weight.device)
    y = triton_trellis_gemm(
        rows.contiguous(),
        tensors["codes"],
        tensors["halos"],
        tensors["codebooks"],
        tensors["codebook_scales"],
        tensors["scales"],
        tensors["bands"],
        tensors["counters"],
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.reshape(-1, layout.out_features).contiguous(),
        list(blocks),
        list(blocks.values()),
        [choose_splits(tensors["counters"].shape[0], count, slots) for count in blocks.values()],
    )
    return y.view(*x.shape[:-1], layout.out_features)
