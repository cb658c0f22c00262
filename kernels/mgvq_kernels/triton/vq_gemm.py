"""Five to 64 rows times a packed matrix on the tensor cores (called by `ops.vq_linear`).

Channel j of every group of a block is a plane: 32 channels that the j-th byte of the codewords
multiplies. So a tile of codes is looked up once, one word a code, and byte j of the words `[rows,
32]` meets plane j of x; nothing is reshaped. x is arranged in planes first, by one launch that
does permutation, padding and SwiGLU too. Weights are exact in half precision, sums float32; splits
are combined as in the GEMV. Takes half precision; registered with torch.library.
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
from mgvq_kernels.tuned import launch_options

STAGE_FIELDS = tl.constexpr(_STAGE_FIELDS)

TILE_ROWS = 128
"""Output rows of a program: the M side of the tensor cores, so that few tokens waste nothing."""

TILE_TOKENS = (16, 32, 64)
"""Tokens of a program: the least that holds them all."""

NUM_STAGES = 3
"""Codes are fetched two blocks ahead, codewords and x one."""


def num_warps(dims: int, tokens: int) -> int:
    """Return the warps of a program: the largest tile spills on four (bf16, sm_86 to sm_90)."""
    return 8 if dims == 8 and tokens == 64 else 4


PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs that run beside each other by registers and shared memory."""

BLOCK_CHANNELS = 512
"""Channels a program arranges."""


@triton.jit
def arrange_kernel(
    x_ptr,  # [T, I], or [T, 2 I] gate and up if SWIGLU
    sources_ptr,  # [width] int32
    planes_ptr,  # [T, width]
    width,
    in_features,
    SWIGLU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """planes[t, c] = x[t, sources[c]], zero where sources[c] is -1; SwiGLU of x if so asked."""
    # program (t, c) -> token t, places c * BLOCK ..
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sources = tl.load(sources_ptr + places, mask=places < width, other=-1)
    present = sources >= 0
    x_ptr += token * (2 * in_features if SWIGLU else in_features)
    x = tl.load(x_ptr + sources, mask=present, other=0.0)
    if SWIGLU:
        up = tl.load(x_ptr + in_features + sources, mask=present, other=0.0).to(tl.float32)
        gate = x.to(tl.float32)
        x = (gate * tl.sigmoid(gate) * up).to(x_ptr.dtype.element_ty)
    tl.store(planes_ptr + token * width + places, x, mask=places < width)


@triton.jit
def vq_gemm_kernel(
    planes_ptr,  # [T, blocks * DIMS * 32]
    codes_ptr,  # blocks of uint8
    words_ptr,  # [M, 256] int32 or int64: an entry's bytes
    book_scales_ptr,  # [M] float32
    scales_ptr,  # [O] float16
    stages_ptr,  # [M, STAGE_FIELDS] int32
    counters_ptr,  # [tiles] int32, zero
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
    TOKENS: tl.constexpr,
):
    """y[t, o] = sum over i of W[o, i] * x[t, i] + bias[o] + residual[t, o]."""
    # program (p, k) -> rows p * ROWS .., all tokens, the k-th share of the blocks
    tile, split = tl.program_id(0), tl.program_id(1)
    row, group, tokens = tl.arange(0, ROWS), tl.arange(0, 32), tl.arange(0, TOKENS)
    places = ((row // 16) * 512 + row % 16)[:, None] + (group * 16)[None, :]  # [ROWS, 32]
    block_bytes = tl.multiple_of(padded_rows.to(tl.int64) * 32, 16)
    code_places = codes_ptr + tile.to(tl.int64) * (ROWS * 32) + places
    kept = tl.minimum(tokens, token_count - 1)[None, :]  # one too many is not stored
    x_places = (
        planes_ptr + kept.to(tl.int64) * (block_count * DIMS * 32) + group[:, None]
    )  # [32, TOKENS]
    begin, end = split * block_count // splits, (split + 1) * block_count // splits
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for s in range(stage_count):
        fields = stages_ptr + s * STAGE_FIELDS
        first_block = tl.load(fields)
        low = tl.maximum(begin, first_block)
        high = tl.minimum(end, first_block + tl.load(fields + 1))
        stage_total = tl.zeros((ROWS, TOKENS), tl.float32)
        for block in range(low, high):
            codes = tl.load(code_places + block * block_bytes)
            words = tl.load(words_ptr + s * 256 + codes.to(tl.int32))
            for j in tl.static_range(DIMS):
                weights = (words >> (8 * j)).to(tl.int8).to(planes_ptr.dtype.element_ty)  # exact
                x = tl.load(x_places + (block * DIMS + j) * 32)
                stage_total = tl.dot(weights, x, stage_total)
        total += stage_total * tl.load(book_scales_ptr + s)
    finish_tile(
        y_ptr, partials_ptr, counters_ptr + tile, scales_ptr, bias_ptr, residual_ptr, total,
        tile * ROWS + row, tokens, split, splits, token_count, out_features, padded_rows,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@torch.library.custom_op("mgvq::triton_vq_gemm", mutates_args=())
def triton_vq_gemm(
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
    """Launch both kernels on 1 to 64 rows `x [T, I]` or, gated, `[T, 2 I]`: `[T, O]`.

    The other tensors are a `PackedVQ`'s. `counters` ends as it began, so two streams must not run
    one weight at a time.
    """
    tokens, out_features = x.shape[0], scales.shape[0]
    tile_tokens = next(most for most in TILE_TOKENS if tokens <= most)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    padded, dims = padded_rows(out_features), word_books.shape[2]
    partials = torch.empty(splits, tokens, padded, dtype=torch.float32, device=x.device)
    options = launch_options(
        x.device,
        f"vq_gemm-d{dims}-{tile_tokens}",
        num_warps=num_warps(dims, tile_tokens),
        num_stages=NUM_STAGES,
    )
    with torch.cuda.device_of(x):
        planes = arrange(x, sources, in_features)
        vq_gemm_kernel[(padded // TILE_ROWS, splits)](
            planes,
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
            TOKENS=tile_tokens,
            **options,
            enable_fp_fusion=True,
        )
    return y


@triton_vq_gemm.register_fake
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


def arrange(x: Tensor, sources: Tensor, in_features: int) -> Tensor:
    """Lay `x [T, I]`, or the product of gate and up `[T, 2 I]`, out in planes: `[T, width]`."""
    tokens, width = x.shape[0], sources.shape[0]
    planes = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    arrange_kernel[(tokens, triton.cdiv(width, BLOCK_CHANNELS))](
        x,
        sources,
        planes,
        width,
        in_features,
        SWIGLU=x.shape[1] != in_features,
        BLOCK=BLOCK_CHANNELS,
        num_warps=4,
    )
    return planes


def linear(x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Multiply 1 to 64 rows `x [..., I]`, or gate and up `[..., 2 I]`, by a weight: `[..., O]`."""
    tensors, layout = weight.tensors, weight.layout
    padded = padded_rows(layout.out_features)
    blocks = tensors["codes"].shape[0] // (padded * 32)
    slots = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(weight.device)
    y = triton_vq_gemm(
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
