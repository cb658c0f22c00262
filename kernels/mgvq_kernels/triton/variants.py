"""What the front door can launch, kernel by kernel (called by the ahead-of-time gate and bench).

A variant names the argument types and compile-time values of one kernel. `main_variants` is one a
kernel, the heaviest; `variants` all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mgvq_kernels.triton import (
    paged_attention,
    paged_prefill,
    rope_write,
    row_ops,
    trellis_variants,
    vq_dequant,
    vq_embedding,
    vq_gemm,
    vq_gemv,
    vq_gemv_int8,
)
from mgvq_kernels.triton.aot import Variant

WEIGHT = {
    "codes_ptr": "*u8",
    "book_scales_ptr": "*fp32",
    "scales_ptr": "*fp16",
    "stages_ptr": "*i32",
    "out_features": "i32",
    "in_features": "i32",
    "padded_rows": "i32",
    "stage_count": "i32",
}
"""Arguments that describe a packed weight, in every kernel that takes them."""

HALVES = ("fp16", "bf16")


def variants() -> Iterator[Variant]:
    """List every kernel over dtypes, vector dimensions and options."""
    for dtype in (*HALVES, "fp32"):
        yield from decoders(dtype)
    for dtype, dims, fused in itertools.product(HALVES, (4, 8), (False, True)):
        yield gemv(dtype, dims, fused)
        yield gemv_int8(dtype, dims, fused)
        yield quantize(dtype, dims, fused)
        for tokens in vq_gemm.TILE_TOKENS:
            yield gemm(dtype, dims, fused, tokens)
    for dtype, gated in itertools.product(HALVES, (False, True)):
        yield arrange(dtype, gated)
    for dtype, quantized in itertools.product(HALVES, (False, True)):
        yield from decode_attention(dtype, quantized)
        for dims in (64, 128):
            yield prefill_attention(dtype, quantized, dims)
        yield norm(dtype, quantized, 4096)
        yield turn_and_store(dtype, quantized, "rope_write_kv")
        yield turn_and_store(dtype, quantized, "write_kv")
    for dtype in HALVES:
        yield gate(dtype)
        yield turn_and_store(dtype, False, "rope")
        yield norm(dtype, True, row_ops.MOST_NORM_WIDTH)
    yield from trellis_variants.variants()


def main_variants() -> Iterator[Variant]:
    """List one variant a kernel: float16, everything fused, the largest vector dimension."""
    yield from decoders("fp16")
    yield gemv("fp16", 8, True)
    yield gemv("fp16", 4, True)
    yield gemv_int8("fp16", 8, True)
    yield gemv_int8("fp16", 4, True)
    yield quantize("fp16", 8, True)
    yield gemm("fp16", 8, True, 64)
    yield gemm("fp16", 4, True, 16)
    yield arrange("fp16", True)
    yield from decode_attention("fp16", False)
    yield from decode_attention("fp16", True)
    yield prefill_attention("fp16", False, 128)
    yield prefill_attention("fp16", True, 128)
    yield norm("fp16", True, row_ops.MOST_NORM_WIDTH)
    yield gate("fp16")
    yield turn_and_store("fp16", True, "rope_write_kv")
    yield from trellis_variants.main_variants()


def gemv(dtype: str, dims: int, fused: bool) -> Variant:
    """Describe the kernel for a few rows; `fused` is bias, residual and SwiGLU at once."""
    signature = linear_signature(dtype) | {"x_ptr": f"*{dtype}", "sources_ptr": "*i32"}
    return Variant(
        f"vq_gemv-{dtype}-d{dims}{'-fused' if fused else ''}",
        vq_gemv.vq_gemv_kernel,
        signature | {"diagonal_books_ptr": "*i8"},
        {"HAS_BIAS": fused, "HAS_RESIDUAL": fused, "SWIGLU": fused, "DIMS": dims}
        | {"ROWS": vq_gemv.TILE_ROWS[dims]},
        {"num_warps": vq_gemv.NUM_WARPS},
        aligned=("padded_rows",),
        loop_weights=vq_gemv.TILE_ROWS[dims] // vq_gemv.NUM_WARPS * dims,
        wide_loads=True,
    )


def gemv_int8(dtype: str, dims: int, fused: bool) -> Variant:
    """Describe the kernel for a few rows in int8; `fused` is bias and residual."""
    words = {"words_ptr": "*i32" if dims == 4 else "*i64", "x_words_ptr": "*i32"}
    return Variant(
        f"vq_gemv_int8-{dtype}-d{dims}{'-fused' if fused else ''}",
        vq_gemv_int8.vq_gemv_int8_kernel,
        linear_signature(dtype) | words | {"run_scales_ptr": "*fp32"},
        {"HAS_BIAS": fused, "HAS_RESIDUAL": fused, "DIMS": dims, "INTERPRET": False}
        | {"ROWS": vq_gemv_int8.TILE_ROWS},
        {"num_warps": vq_gemv_int8.NUM_WARPS},
        aligned=("padded_rows",),
        loop_weights=vq_gemv_int8.TILE_ROWS // vq_gemv_int8.NUM_WARPS * dims,
        wide_loads=True,
    )


def quantize(dtype: str, dims: int, gated: bool) -> Variant:
    """Describe the kernel that rounds x to int8."""
    return Variant(
        f"quantize-{dtype}-d{dims}{'-gated' if gated else ''}",
        vq_gemv_int8.quantize_kernel,
        {"x_ptr": f"*{dtype}", "sources_ptr": "*i32", "bytes_ptr": "*i8"}
        | {"run_scales_ptr": "*fp32", "in_features": "i32"},
        {"SWIGLU": gated, "DIMS": dims},
        {"num_warps": 1, "enable_fp_fusion": False},
    )


def gemm(dtype: str, dims: int, fused: bool, tokens: int) -> Variant:
    """Describe the kernel for up to 64 rows; `fused` is bias and residual."""
    signature = linear_signature(dtype) | {"planes_ptr": f"*{dtype}"}
    warps = vq_gemm.num_warps(dims, tokens)
    return Variant(
        f"vq_gemm-{dtype}-d{dims}-{tokens}{'-fused' if fused else ''}",
        vq_gemm.vq_gemm_kernel,
        signature | {"words_ptr": "*i32" if dims == 4 else "*i64"},
        {"HAS_BIAS": fused, "HAS_RESIDUAL": fused, "DIMS": dims, "ROWS": vq_gemm.TILE_ROWS}
        | {"TOKENS": tokens},
        {"num_warps": warps, "num_stages": vq_gemm.NUM_STAGES},
        aligned=("padded_rows",),
        loop_weights=vq_gemm.TILE_ROWS // warps * dims,
        wide_loads=True,
    )


def linear_signature(dtype: str) -> dict[str, str]:
    """Type the arguments that both linear kernels take."""
    floats = dict.fromkeys(("bias_ptr", "residual_ptr", "y_ptr"), f"*{dtype}")
    counts = dict.fromkeys(("token_count", "block_count", "splits"), "i32")
    return WEIGHT | floats | counts | {"counters_ptr": "*i32", "partials_ptr": "*fp32"}


def arrange(dtype: str, gated: bool) -> Variant:
    """Describe the kernel that lays x out in planes."""
    return Variant(
        f"arrange-{dtype}{'-gated' if gated else ''}",
        vq_gemm.arrange_kernel,
        {"x_ptr": f"*{dtype}", "sources_ptr": "*i32", "planes_ptr": f"*{dtype}"}
        | {"width": "i32", "in_features": "i32"},
        {"SWIGLU": gated, "BLOCK": vq_gemm.BLOCK_CHANNELS},
        {},
    )


def decoders(dtype: str) -> Iterator[Variant]:
    """Describe the kernels that make dense weights."""
    signature = WEIGHT | {
        "books_ptr": "*i8",
        "permutation_ptr": "*i32",
        "out_ptr": f"*{dtype}",
        "ids_ptr": "*i64",
        "first_row": "i32",
        "end_row": "i32",
    }
    yield Variant(
        f"vq_dequant-{dtype}",
        vq_dequant.vq_dequant_kernel,
        signature,
        {"BLOCK_O": vq_dequant.BLOCK_O, "BLOCK_I": vq_dequant.BLOCK_I},
        {"enable_fp_fusion": False},
        aligned=("padded_rows",),
    )
    for permuted in (False, True):
        yield Variant(
            f"vq_embedding-{dtype}{'-permuted' if permuted else ''}",
            vq_embedding.vq_embedding_kernel,
            signature,
            {"HAS_PERMUTATION": permuted, "BLOCK_I": vq_embedding.BLOCK_I},
            {"enable_fp_fusion": False},
            aligned=("padded_rows",),
        )


def decode_attention(dtype: str, quantized: bool) -> Iterator[Variant]:
    """Describe the two kernels of decode attention, with heads of 128 and pages of 16 tokens."""
    mark = f"{dtype}{'-int8' if quantized else ''}"
    sizes = {"DIMS": 128, "SPLIT": paged_attention.SPLIT_TOKENS}
    signature = attention_signature(dtype, quantized)
    yield Variant(
        f"attend_split-{mark}",
        paged_attention.attend_split_kernel,
        signature,
        {"QUANTIZED": quantized, "BLOCK_SIZE": 16, "HEADS": 16, **sizes}
        | {"TILE": paged_attention.TILE_TOKENS},
        {},
        aligned=("head_dim",),
        wide_loads=True,
    )
    if not quantized:
        yield Variant(
            f"combine_splits-{mark}", paged_attention.combine_splits_kernel, signature, sizes, {}
        )


def prefill_attention(dtype: str, quantized: bool, dims: int) -> Variant:
    """Describe the kernel for prompts, with seven query heads a key/value head as in Qwen2-VL."""
    return Variant(
        f"attend_chunk-{dtype}-{dims}{'-int8' if quantized else ''}",
        paged_prefill.attend_chunk_kernel,
        attention_signature(dtype, quantized),
        {"QUANTIZED": quantized, "BLOCK_SIZE": 16, "DIMS": dims}
        | {"ROWS": paged_prefill.TILE_ROWS, "QUERIES": paged_prefill.TILE_ROWS // 7}
        | {"TILE": paged_prefill.TILE_TOKENS},
        {"num_stages": paged_prefill.NUM_STAGES, "maxnreg": paged_prefill.max_registers(dims)},
        aligned=("head_dim",),
        wide_loads=True,
    )


def attention_signature(dtype: str, quantized: bool) -> dict[str, str]:
    """Type the arguments that the kernels of attention take."""
    cache = "*i8" if quantized else f"*{dtype}"
    counts = ("num_heads", "num_kv_heads", "head_dim", "max_blocks", "splits", "requests")
    return {
        "q_ptr": f"*{dtype}",
        "key_ptr": cache,
        "value_ptr": cache,
        "key_scales_ptr": "*fp16",
        "value_scales_ptr": "*fp16",
        "block_table_ptr": "*i32",
        "cu_seqlens_q_ptr": "*i32",
        "context_lens_ptr": "*i32",
        "sums_ptr": "*fp32",
        "tops_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
        "score_scale": "fp32",
    } | dict.fromkeys(counts, "i32")


def norm(dtype: str, has_residual: bool, width: int) -> Variant:
    """Describe the norm of rows of up to `width` numbers, a power of two."""
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "total_ptr")
    return Variant(
        f"rms_norm-{dtype}-{width}{'-add' if has_residual else ''}",
        row_ops.rms_norm_kernel,
        dict.fromkeys(pointers, f"*{dtype}") | {"width": "i32", "eps": "fp32"},
        {"HAS_RESIDUAL": has_residual, "BLOCK": width},
        {"num_warps": row_ops.norm_warps(width)},
        aligned=("width",),
        wide_loads=True,
    )


def gate(dtype: str) -> Variant:
    """Describe the gate of an MLP."""
    return Variant(
        f"swiglu-{dtype}",
        row_ops.swiglu_kernel,
        dict.fromkeys(("gate_up_ptr", "out_ptr"), f"*{dtype}") | {"features": "i32"},
        {"BLOCK": row_ops.BLOCK_F},
        {},
        aligned=("features",),
        wide_loads=True,
    )


def turn_and_store(dtype: str, quantized: bool, op: str) -> Variant:
    """Describe the kernel of `rope_write_kv`, `write_kv` or `rope`, with heads of 128."""
    cache = "*i8" if quantized else f"*{dtype}"
    counts = ("q_stride", "k_stride", "v_stride", "num_heads", "num_kv_heads", "head_dim")
    return Variant(
        f"{op}-{dtype}{'-int8' if quantized else ''}",
        rope_write.rope_write_kernel,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_out_ptr"), f"*{dtype}")
        | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
        | dict.fromkeys(("key_ptr", "value_ptr"), cache)
        | dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp16")
        | dict.fromkeys(counts, "i32")
        | {"slots_ptr": "*i64"},
        {"ROTATE": op != "write_kv", "HAS_SLOTS": op != "rope", "QUANTIZED": quantized, "HALF": 64},
        {"num_warps": 1, "enable_fp_fusion": False},
        aligned=("q_stride", "k_stride", "v_stride", "head_dim"),
    )
