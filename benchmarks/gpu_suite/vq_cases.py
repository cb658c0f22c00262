"""Cases of the ops on quantized weights: decoding, embedding and every way to multiply.

One generator an op, in `CASES`. A new way to multiply is a line of `LINEARS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.cases import TOLERANCES, Cases, OpCase
from benchmarks.gpu_suite.place import Place
from benchmarks.gpu_suite.weights import (
    MIXED,
    TINY,
    TRELLIS_MIXED,
    TRELLIS_TINY,
    decode,
    random_weight,
)
from mgvq_kernels import ops, reference
from mgvq_kernels.layout import PackedVQ, VQLayout, VQWeight
from mgvq_kernels.packing import pack
from mgvq_kernels.triton import (
    trellis_dequant,
    trellis_embedding,
    trellis_gemm,
    trellis_gemv,
    vq_dequant,
    vq_embedding,
    vq_gemm,
    vq_gemv,
    vq_gemv_int8,
)

DECODERS: Mapping[str, Any] = {"lookup": vq_dequant, "trellis": trellis_dequant}
EMBEDDINGS: Mapping[str, Any] = {"lookup": vq_embedding, "trellis": trellis_embedding}
"""Kernels of an op by how the weight is coded."""

Linear = Callable[[Tensor, PackedVQ, Tensor | None, Tensor | None], Tensor]


def decode_linear(
    x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Multiply by slices of the decoded matrix; the residual is added as the front door does."""
    y = DECODERS[weight.layout.codec].decode_linear(x, weight, bias)
    return y if residual is None else y + residual


LINEARS: Mapping[str, tuple[Linear, str, int]] = {
    "gemv": (vq_gemv.linear, "gemv", 16),
    "gemv int8": (vq_gemv_int8.linear, "int8 x", 4),
    "gemm": (vq_gemm.linear, "gemm", 64),
    "decode": (decode_linear, "gemm", 1 << 30),
}
"""Ways to multiply: entry point, tolerance, and the most rows of x it is tried with. Rounding x to
int8 is on request only, so it is timed beside the others and never counted as ours."""

TRELLIS_LINEARS: Mapping[str, tuple[Linear, str, int]] = {
    "trellis gemv": (trellis_gemv.linear, "gemv", 16),
    "trellis gemm": (trellis_gemm.linear, "gemm", 64),
    "trellis decode": (decode_linear, "gemm", 1 << 30),
}
"""The same for a trellis."""

REAL = VQLayout.uniform(3584, 3584, 2, has_permutation=True)
TRELLIS_REAL = VQLayout.uniform(3584, 3584, 2, has_permutation=True, codec="trellis")
"""o_proj of Qwen2-VL-7B."""


def linears_of(layout: VQLayout) -> Mapping[str, tuple[Linear, str, int]]:
    """List the ways to multiply a weight coded as this one is."""
    return LINEARS if layout.codec == "lookup" else TRELLIS_LINEARS


def layouts(place: Place, real: bool) -> tuple[VQLayout, ...]:
    """Choose the layouts that are checked: all bands and stages at once, or a real matrix."""
    if real:
        return (REAL, TRELLIS_REAL) if place.is_gpu else ()
    if not place.is_gpu:
        return (TINY, TRELLIS_TINY)
    return (MIXED, VQLayout.uniform(520, 264, 2), TRELLIS_MIXED)


def vq_linear(place: Place, real: bool) -> Iterator[OpCase]:
    """Every way to multiply at the rows where its tiles change; the front door on a GPU."""
    for layout in layouts(place, real):
        weight = random_weight(layout, seed=1, device=place.device)
        packed, dense = pack(weight, "triton", place.device), decode(weight)
        shape = f"{layout.codec} {layout.in_features}->{layout.out_features}"
        for dtype in place.dtypes:
            for name, (linear, tolerance, most) in linears_of(layout).items():
                counts = (1, 4, 5, 16, 17, 64, 65) if place.is_gpu else (1, 3)
                for rows in (n for n in counts if n <= most):
                    yield product(
                        f"{name} {_words(dtype)} {rows}x{shape}",
                        linear, packed, dense, rows, dtype, TOLERANCES[tolerance][dtype],
                    )  # fmt: skip
            if place.is_gpu:
                for rows in (1, 6, 66):
                    yield gated_product(packed, dense, rows, dtype)


def product(
    variant: str,
    linear: Linear,
    packed: PackedVQ,
    dense: Tensor,
    rows: int,
    dtype: torch.dtype,
    tolerance: float,
) -> OpCase:
    """Describe `linear` on random rows with bias and residual, against `dense` in float64."""
    generator = torch.Generator().manual_seed(rows)
    outputs, inputs = dense.shape
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    residual = torch.randn(rows, outputs, generator=generator).to(dtype)
    here = [tensor.to(packed.device) for tensor in (x, bias, residual)]
    return OpCase(
        variant,
        lambda: linear(here[0], packed, here[1], here[2]),
        lambda: x.double() @ dense.T + bias.double() + residual.double(),
        tolerance,
    )


def gated_product(packed: PackedVQ, dense: Tensor, rows: int, dtype: torch.dtype) -> OpCase:
    """Describe the front door on gate and up: it chooses the path by rows."""
    x = torch.randn(rows, 2 * dense.shape[1], generator=torch.Generator().manual_seed(rows))
    x = x.to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    product_input = (gate * torch.sigmoid(gate) * up).to(dtype).double()
    here = x.to(packed.device)
    return OpCase(
        f"front door, gated {packed.layout.codec} {_words(dtype)} {rows}x{dense.shape[1]}",
        lambda: ops.vq_linear(here, packed, gated=True),
        lambda: product_input @ dense.T,
        TOLERANCES["gemm"][dtype],
    )


def vq_dequantize(place: Place, real: bool) -> Iterator[OpCase]:
    """Decode a whole matrix: the bits of the reference on the CPU, and near the float64 truth."""
    for layout in layouts(place, real):
        weight = random_weight(layout, seed=2, device=place.device)
        packed = pack(weight, "triton", place.device)
        shape = f"{layout.codec} {layout.out_features}x{layout.in_features}"
        decoder = DECODERS[layout.codec]
        for dtype in (torch.float32, *place.dtypes):
            yield OpCase(
                f"bits {_words(dtype)} {shape}",
                functools.partial(decoder.vq_dequantize, packed, dtype),
                lambda dtype=dtype, weight=weight: _reference(weight, dtype),
                0.0,
                "bits",
                nbytes=layout.code_bits() // 8 + dtype.itemsize * layout.num_weights if real else 0,
            )
        yield OpCase(
            f"float64 {shape}",
            functools.partial(decoder.vq_dequantize, packed, torch.float32),
            lambda weight=weight: decode(weight),
            1e-6,
        )


def embedding(place: Place, real: bool) -> Iterator[OpCase]:
    """Decode rows by id, the first and the last among them."""
    for layout in layouts(place, real):
        weight = random_weight(layout, seed=3, device=place.device)
        packed = pack(weight, "triton", place.device)
        last = layout.out_features - 1
        ids = torch.tensor([last, 0, last // 2] * (32 if real else 1))
        here = ids.to(place.device)
        for dtype in place.dtypes:
            yield OpCase(
                f"{_words(dtype)} {len(ids)} ids of {layout.codec} "
                f"{layout.out_features}x{layout.in_features}",
                functools.partial(EMBEDDINGS[layout.codec].vq_embedding, here, packed, dtype),
                lambda weight=weight, ids=ids: decode(weight)[ids],
                torch.finfo(dtype).eps,
                nbytes=len(ids) * layout.in_features * 2 if real else 0,
            )


CASES: Mapping[str, Cases] = {
    "vq_linear": vq_linear,
    "vq_dequantize": vq_dequantize,
    "vq_embedding": embedding,
}
"""By op of `mgvq_kernels.ops.OPS`."""


def _reference(weight: VQWeight, dtype: torch.dtype) -> Tensor:
    return reference.vq_dequantize(weight.to("cpu"), dtype)


def _words(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
