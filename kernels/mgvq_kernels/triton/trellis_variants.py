"""What the front door can launch on a trellis, kernel by kernel (called by `variants`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mgvq_kernels.layout import TRELLIS_RATES
from mgvq_kernels.trellis_order import BAND_FIELDS
from mgvq_kernels.triton import trellis_dequant, trellis_embedding, trellis_gemm, trellis_gemv
from mgvq_kernels.triton.aot import Variant
from mgvq_kernels.triton.vq_gemm import TILE_TOKENS

WEIGHT = {
    "codes_ptr": "*i32",
    "halos_ptr": "*i32",
    "books_ptr": "*i8",
    "book_scales_ptr": "*fp32",
    "scales_ptr": "*fp16",
    "bands_ptr": "*i32",
    "permutation_ptr": "*i32",
    "out_features": "i32",
    "in_features": "i32",
    "padded_rows": "i32",
    "band_count": "i32",
}
"""Arguments that describe a packed trellis, in every kernel that takes them."""


def variants() -> Iterator[Variant]:
    """List every kernel over dtypes, rates, rows of x and options."""
    for rate in TRELLIS_RATES:
        for dtype in ("fp16", "bf16", "fp32"):
            yield dequant(dtype, rate)
        for dtype in ("fp16", "bf16"):
            for tokens in (1, 2, 4):
                yield gemv(dtype, rate, tokens, True)
            # In bfloat16 the largest tile alone, which is nearest to a spill: each takes seconds.
            for tokens in TILE_TOKENS if dtype == "fp16" else TILE_TOKENS[-1:]:
                yield gemm(dtype, rate, tokens)
        yield gemv("fp16", rate, 1, False)
    for dtype in ("fp16", "bf16", "fp32"):
        yield embedding(dtype, False)
        yield embedding(dtype, True)


def main_variants() -> Iterator[Variant]:
    """List the kernels in float16, everything fused: for one row and for four."""
    yield gemv("fp16", 2, 1, True)
    yield gemv("fp16", 3, 4, True)
    yield gemm("fp16", 2, 64)
    yield gemm("fp16", 3, 16)
    yield dequant("fp16", 3)
    yield embedding("fp16", True)


def product(dtype: str) -> Mapping[str, str]:
    """Name the argument types of both kernels that multiply."""
    floats = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "y_ptr"), f"*{dtype}")
    counts = dict.fromkeys(("token_count", "block_count", "first_split", "splits"), "i32")
    return WEIGHT | floats | counts | {"counters_ptr": "*i32", "partials_ptr": "*fp32"}


def gemv(dtype: str, rate: int, tokens: int, fused: bool) -> Variant:
    """Describe the kernel for a few rows; `fused` is permutation, bias and residual at once."""
    return Variant(
        f"trellis_gemv-{dtype}-{rate}bit-{tokens}{'-fused' if fused else ''}",
        trellis_gemv.trellis_gemv_kernel,
        product(dtype),
        dict.fromkeys(("HAS_PERMUTATION", "HAS_BIAS", "HAS_RESIDUAL"), fused)
        | {"RATE": rate, "TOKENS": tokens},
        {"num_warps": trellis_gemv.NUM_WARPS},
        aligned=("padded_rows",),
        loop_weights=trellis_gemv.THREAD_WEIGHTS,
        wide_loads=True,
    )


def gemm(dtype: str, rate: int, tokens: int) -> Variant:
    """Describe the kernel on the tensor cores, with bias and residual."""
    return Variant(
        f"trellis_gemm-{dtype}-{rate}bit-{tokens}",
        trellis_gemm.trellis_gemm_kernel,
        product(dtype),
        {"HAS_BIAS": True, "HAS_RESIDUAL": True, "RATE": rate, "TOKENS": tokens}
        | {"GROUPS": trellis_gemm.step_groups(tokens)},
        {"num_warps": trellis_gemm.NUM_WARPS},
        aligned=("padded_rows", "in_features"),
        loop_weights=8 * trellis_gemm.step_groups(tokens),
    )


def dequant(dtype: str, rate: int) -> Variant:
    """Describe the kernel that makes dense weights."""
    return Variant(
        f"trellis_dequant-{dtype}-{rate}bit",
        trellis_dequant.trellis_dequant_kernel,
        WEIGHT | {"out_ptr": f"*{dtype}"} | dict.fromkeys(("band", "first_row", "end_row"), "i32"),
        {"RATE": rate, "GROUPS": trellis_dequant.GROUPS, "BAND_FIELDS": BAND_FIELDS},
        {"num_warps": trellis_dequant.NUM_WARPS, "enable_fp_fusion": False},
        aligned=("in_features",),
    )


def embedding(dtype: str, permuted: bool) -> Variant:
    """Describe the kernel that decodes rows by id."""
    return Variant(
        f"trellis_embedding-{dtype}{'-permuted' if permuted else ''}",
        trellis_embedding.trellis_embedding_kernel,
        WEIGHT | {"ids_ptr": "*i64", "out_ptr": f"*{dtype}"},
        {"HAS_PERMUTATION": permuted, "BAND_FIELDS": BAND_FIELDS}
        | {"BLOCK_I": trellis_embedding.BLOCK_I},
        {"enable_fp_fusion": False},
    )
