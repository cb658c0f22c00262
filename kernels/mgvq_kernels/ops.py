"""The front door: checks arguments, picks a backend, runs it (called by `mgvq_runtime.layers`).

Every op takes tensors and gives tensors; `reference.py` says what it must compute. Backends other
than the reference are imported on first use. Wrong arguments raise `ValueError`, `TypeError` or
`NotImplementedError` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgvq_kernels import checks, dispatch, reference, tuned
from mgvq_kernels.dense_ops import add_rms_norm as add_rms_norm
from mgvq_kernels.dense_ops import paged_attention as paged_attention
from mgvq_kernels.dense_ops import paged_attention_decode as paged_attention_decode
from mgvq_kernels.dense_ops import paged_attention_prefill as paged_attention_prefill
from mgvq_kernels.dense_ops import rms_norm as rms_norm
from mgvq_kernels.dense_ops import rope as rope
from mgvq_kernels.dense_ops import rope_write_kv as rope_write_kv
from mgvq_kernels.dense_ops import swiglu as swiglu
from mgvq_kernels.dense_ops import varlen_attention as varlen_attention
from mgvq_kernels.dense_ops import write_kv as write_kv
from mgvq_kernels.installed import has_numba as has_numba
from mgvq_kernels.installed import has_triton as has_triton
from mgvq_kernels.layout import PackedVQ, VQWeight
from mgvq_kernels.packing import pack, unpack

OPS = (
    "vq_dequantize",
    "vq_linear",
    "vq_embedding",
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "rope",
    "varlen_attention",
    "write_kv",
    "rope_write_kv",
    "paged_attention",
    "paged_attention_prefill",
    "paged_attention_decode",
)
"""Every op, each with a reference of the same name and a test."""


def pack_for(weight: VQWeight, device: torch.device | str) -> PackedVQ:
    """Pack a weight in the order the fastest available backend of a device reads.

    Args:
        weight: the matrix in logical order.
        device: where it will run.

    Returns:
        The packed weight, ready for `vq_linear` and `vq_embedding`.
    """
    kind = torch.device(device).type
    numba = kind == "cpu" and has_numba()
    triton = kind == "cuda" and has_triton()
    return pack(weight, dispatch.choose_pack(kind, numba, triton), device)


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile or read what `device` will need, so that the first request does not wait for it.

    Does nothing where there is nothing to compile, nor a table of tuned launches to read.

    Args:
        device: the device about to serve.
    """
    device = torch.device(device)
    if device.type == "cpu" and has_numba():
        _cpu().warm_up()
    if device.type == "cuda" and has_triton():
        index = torch.cuda.current_device() if device.index is None else device.index
        tuned.for_device(torch.device("cuda", index))


def vq_dequantize(weight: VQWeight | PackedVQ, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode a weight to the dense matrix an `nn.Linear` would hold.

    Args:
        weight: packed or in logical order.
        dtype: dtype of the result; computed in at least float32.

    Returns:
        `[O, I]` in original channel order.

    Raises:
        TypeError: if `weight` is no VQ weight or `dtype` no floating dtype.
    """
    checks.check_float("dtype", dtype)
    if isinstance(weight, VQWeight):
        return reference.vq_dequantize(weight, dtype)
    path = _path("vq_dequantize", 0, weight)
    if path == "reference":
        return reference.vq_dequantize(unpack(weight), dtype)
    if path == "cpu_decode":
        return _cpu().dequantize(weight).to(dtype)
    return _triton("dequant", weight.layout.codec).vq_dequantize(weight, dtype)


def vq_linear(
    x: Tensor,
    weight: PackedVQ,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    int8_activations: bool = False,
) -> Tensor:
    """Multiply activations by a vector-quantized weight.

    Few rows are multiplied straight from the codes; many are multiplied by a dense matrix that is
    decoded for the call, slice by slice, and dropped after it.

    Args:
        x: `[..., I]` float32, float16, bfloat16 or float64, on the weight's device; with `gated`
            `[..., 2 I]`.
        weight: a packed `[O, I]` matrix.
        bias: `[O]` floating, on the same device, or None.
        residual: `[..., O]` of x's dtype, added to the result, or None.
        gated: whether x is gate and up, whose `swiglu` is multiplied.
        int8_activations: whether x may be rounded to int8, with a scale for 128 channels, where a
            kernel gains by it: few rows on a GPU. Elsewhere nothing is rounded.

    Returns:
        `[..., O]` in x's dtype; sums are accumulated in float32 (float64 x is rounded to float32
        except by the reference backend). Gradients flow to `x`, `bias`
            and `residual`.

    Raises:
        TypeError: if `weight` is not packed or a dtype is not floating.
        ValueError: if shapes or devices disagree, with both values.
    """
    checks.check_linear(x, weight, bias, residual, gated)
    rows = x.numel() // x.shape[-1]
    path = _path("vq_linear", rows, weight, x.element_size() == 2)
    gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, bias, residual)
    )
    if not gradient and path in ("triton_gemv", "triton_gemm"):
        codec = weight.layout.codec
        if int8_activations and path == "triton_gemv" and codec == "lookup":
            # Tuned limits may name more rows than a launch of it has counters for.
            path = "triton_gemv_int8" if rows <= dispatch.TRITON_GEMV_ROWS else path
        kernel = _triton(path.removeprefix("triton_"), codec)
        return kernel.linear(x, weight, bias, residual)
    if gated or residual is not None:
        y = vq_linear(swiglu(x) if gated else x, weight, bias)
        return y if residual is None else y + residual
    if gradient and path != "reference":
        dense = vq_dequantize(weight, reference.compute_dtype(x.dtype))
        return F.linear(x.to(dense.dtype), dense, _cast(bias, dense.dtype)).to(x.dtype)
    if path == "cpu_lookup":
        return _cpu().lookup_linear(x, weight, bias)
    if path == "cpu_trellis":
        return _cpu().trellis_linear(x, weight, bias)
    if path == "cpu_decode":
        return _cpu().decode_linear(x, weight, bias)
    if path == "reference":
        return reference.vq_linear(x, unpack(weight), bias)
    return _triton("dequant", weight.layout.codec).decode_linear(x, weight, bias)


def vq_embedding(ids: Tensor, weight: PackedVQ, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look rows of a vector-quantized table up.

    Args:
        ids: `[T]` int64 in [0, O), on the weight's device.
        weight: a packed `[O, I]` table.
        dtype: dtype of the result.

    Returns:
        `[T, I]` in `dtype`.

    Raises:
        TypeError: if `weight` is not packed, `ids` not int64 or `dtype` not floating.
        ValueError: if `ids` is not one-dimensional, on another device, or (on a CPU, where looking
            costs nothing) out of range.
    """
    if not isinstance(weight, PackedVQ):
        raise TypeError(f"weight must be a PackedVQ, got {type(weight).__name__}; call pack first")
    checks.check_float("dtype", dtype)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"ids must be [T], got {list(ids.shape)}")
    if ids.device != weight.device:
        raise ValueError(f"ids is on {ids.device}, weight is on {weight.device}")
    if ids.numel() == 0:
        return torch.empty(0, weight.layout.in_features, dtype=dtype, device=ids.device)
    if ids.is_cpu:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= weight.layout.out_features:
            raise ValueError(f"ids must be in [0, {weight.layout.out_features}), got {low}..{high}")
    path = _path("vq_embedding", ids.numel(), weight)
    if path == "cpu_decode":
        return _cpu().embedding(ids, weight).to(dtype)
    if path == "reference":
        return reference.vq_embedding(ids, unpack(weight), dtype)
    return _triton("embedding", weight.layout.codec).vq_embedding(ids, weight, dtype)


def _path(op: str, rows: int, weight: PackedVQ, is_half: bool = True) -> str:
    """Choose the code path by the order the weight is packed in."""
    if not isinstance(weight, PackedVQ):
        raise TypeError(f"weight must be a PackedVQ or VQWeight, got {type(weight).__name__}")
    order = weight.backend
    wide = order == "cpu" and _cpu().HAS_BYTE_PERMUTE
    limits = tuned.for_device(weight.device).rows if order == "triton" else dispatch.DEFAULT_LIMITS
    return dispatch.choose_backend(
        op,
        rows,
        weight.layout,
        weight.device.type,
        order == "cpu",
        order == "triton",
        wide,
        is_half,
        limits,
    )


@functools.cache
def _cpu() -> Any:
    """Import the cpu backend on first use; later calls cost a dictionary look-up."""
    return importlib.import_module("mgvq_kernels.cpu")


@functools.cache
def _triton(step: str, codec: str) -> Any:
    """Import what does one step for one codec in the triton backend, on first use."""
    prefix = "vq" if codec == "lookup" else codec
    return importlib.import_module(f"mgvq_kernels.triton.{prefix}_{step}")


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
