"""Which code path runs an op: pure tables (called by `ops`, tested without a GPU).

Looks at shapes and at what is installed; touches no device and imports no kernel.
"""

from __future__ import annotations

import dataclasses

import torch

from mgvq_kernels.layout import VQLayout

LOOKUP_ROWS = 32
"""Most rows of x that are looked up where bytes can be permuted (AVX512-VBMI). One Zen 4 core,
torch 2.13, 2026-11, us, lookup / decode + matmul: 512x256 196 / 229 at 32 rows, 310 / 243 at 64;
8960x1536 11,800 / 40,900 at 32 rows, 24,000 / 29,950 at 64. More rows are decoded on large
matrices too: there it is then exact in float32."""

GATHER_ROWS = 64
"""Most rows of x that are looked up elsewhere, eight at a time. One Zen 3 core (AVX2) of a busy
machine, torch 2.13, 2026-11, us, lookup / decode + matmul: 1536x256 95 / 622 at 8 rows, 1,011 /
1,975 at 64, 1,300 / 2,355 at 128; 256x768 137 / 361, 765 / 888, 1,364 / 1,164; 1536x1536 744 /
11,941 at 8 rows."""

TRELLIS_ROWS = 8
"""Most rows of x that a trellis is multiplied by as it is decoded, on a CPU. One core (AVX2) of a
busy machine, torch 2.13, 2026-11, ns a weight at 2 bits, as it is decoded / decode + matmul:
1536x8960 1.1 / 1.4 at 4 rows, 1.4 / 1.5 at 8, 2.5 / 1.7 at 16; 256x768 1.7 / 2.1 at 8, 2.4 / 2.3
at 16."""

TRITON_GEMV_ROWS = 4
TRITON_GEMM_ROWS = 64
"""Most rows of x that are multiplied by tables of partial sums, and by codewords on the tensor
cores; more by slices of the decoded matrix. Set by design; `tuned` may hold other limits for the
GPU at hand. One H100, triton 3.6, 2026-11, us, GEMV / GEMM / decode + matmul at 1, 4 and 64 rows:
4608x3584 9.5 / 20.9 / 43, 28 / 22.5 / 43, 434 / 30 / 43; 37888x3584 37 / 98 / 299, 116 / 99 / 294,
1,811 / 121 / 287."""

LEAST_HEAD_DIM = 16
"""Width of the narrowest heads the Triton attention takes: tensor cores multiply no fewer."""

CHOSEN_OPS = ("vq_linear", "vq_dequantize", "vq_embedding")
"""Ops that have more than the reference path."""


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Most rows of x for each Triton kernel."""

    gemv: int = TRITON_GEMV_ROWS
    gemm: int = TRITON_GEMM_ROWS


DEFAULT_LIMITS = RowLimits()

TRELLIS_LIMITS = RowLimits()
"""The same for a trellis, whatever was tuned for lookups: rows of one launch of the GEMV, which
decodes once, and of the GEMM's largest tile. Set by design, not measured."""


def choose_pack(device_type: str, numba_available: bool, triton_available: bool) -> str:
    """Choose the order a weight is packed in on a device.

    Args:
        device_type: "cpu", "cuda", ...
        numba_available: whether the cpu kernels can be compiled.
        triton_available: whether Triton kernels can be compiled.

    Returns:
        A name of `layout.BACKENDS`.
    """
    if device_type == "cpu" and numba_available:
        return "cpu"
    if device_type == "cuda" and triton_available:
        return "triton"
    return "reference"


def choose_backend(  # noqa: PLR0913
    op: str,
    rows: int,
    layout: VQLayout,
    device_type: str,
    numba_available: bool,
    triton_available: bool,
    has_byte_permute: bool = False,
    is_half: bool = True,
    limits: RowLimits = DEFAULT_LIMITS,
) -> str:
    """Choose the path that runs one op.

    Args:
        op: a name of `CHOSEN_OPS`.
        rows: rows of x (tokens) the op handles.
        layout: the weight's layout.
        device_type: where the weight lives.
        numba_available: whether the cpu kernels can be compiled.
        triton_available: whether Triton kernels can be compiled.
        has_byte_permute: whether the CPU looks 64 codes up at a time.
        is_half: whether x is float16 or bfloat16, which the tensor cores multiply exactly.
        limits: most rows of x for each Triton kernel.

    Returns:
        "cpu_lookup" (partial sums, codes only), "cpu_trellis" (weights decoded as they are
        multiplied), "cpu_decode" (decode with the cpu kernels, then torch), "triton_gemv" (partial
        sums; a trellis decoded as it is multiplied), "triton_gemm" (codewords, or a trellis as it
        is decoded, on the tensor cores), "triton_decode" (decode, then torch) or "reference".

    Raises:
        ValueError: if the op is not in `CHOSEN_OPS`.
    """
    if op not in CHOSEN_OPS:
        raise ValueError(f"op must be one of {CHOSEN_OPS}, got {op!r}")
    order = choose_pack(device_type, numba_available, triton_available)
    if order == "cpu":
        if layout.codec == "trellis":
            return "cpu_trellis" if op == "vq_linear" and rows <= TRELLIS_ROWS else "cpu_decode"
        most = LOOKUP_ROWS if has_byte_permute else GATHER_ROWS
        return "cpu_lookup" if op == "vq_linear" and rows <= most else "cpu_decode"
    if order == "triton":
        if layout.codec == "trellis":
            limits = TRELLIS_LIMITS
        if op != "vq_linear" or not is_half or rows > limits.gemm:
            return "triton_decode"
        return "triton_gemv" if rows <= limits.gemv else "triton_gemm"
    return "reference"


def choose_attention(
    device_type: str,
    dtype: torch.dtype,
    one_token_each: bool,
    numba_available: bool,
    triton_available: bool,
) -> str:
    """Choose the path of attention over a paged cache.

    Args:
        device_type: where the cache lives.
        dtype: of the queries; the cache has it too, or is int8.
        one_token_each: whether every request brings one new token.
        numba_available: whether the cpu kernels can be compiled.
        triton_available: whether Triton kernels can be compiled.

    Returns:
        "triton_decode", "triton_prefill", "cpu" or "reference".
    """
    if device_type == "cpu" and dtype is torch.float32 and numba_available:
        return "cpu"
    if device_type != "cuda" or dtype.itemsize != 2 or not triton_available:
        return "reference"
    return "triton_decode" if one_token_each else "triton_prefill"
