"""The front door: checks arguments, picks a backend, runs it (called by `mgvq_runtime.layers`).

Every op takes tensors and gives tensors; `reference.py` says what it must compute. Backends other
than the reference are imported on first use. Wrong arguments raise `ValueError`, `TypeError` or
`NotImplementedError` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgvq_kernels import checks, dispatch, reference
from mgvq_kernels.layout import PackedVQ, VQWeight, pack, unpack

logger = logging.getLogger(__name__)

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
    "paged_attention",
)
"""Every op, each with a reference of the same name and a test."""


@functools.cache
def has_numba() -> bool:
    """Say whether the cpu kernels can be compiled; logs the fallback once if they cannot."""
    found = importlib.util.find_spec("numba") is not None
    if not found:
        logger.warning(
            "numba is not installed: quantized layers on the CPU decode their weights at every "
            "call, which is slow (install the 'cpu' extra)"
        )
    return found


@functools.cache
def has_triton() -> bool:
    """Say whether the GPU kernels can be compiled; logs the fallback once if they cannot."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed: quantized layers on the GPU run plain torch ops")
    return found


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
    """Compile what `device` will need, so that the first request does not wait for it.

    Does nothing where there is nothing to compile.

    Args:
        device: the device about to serve.
    """
    if torch.device(device).type == "cpu" and has_numba():
        _cpu().warm_up()


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
    return _triton("vq_dequant").vq_dequantize(weight, dtype)


def vq_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a vector-quantized weight.

    Few rows are multiplied straight from the codes; many are multiplied by a dense matrix that is
    decoded for the call and dropped after it.

    Args:
        x: `[..., I]` float32, float16, bfloat16 or float64, on the weight's device.
        weight: a packed `[O, I]` matrix.
        bias: `[O]` floating, on the same device, or None.

    Returns:
        `[..., O]` in x's dtype; sums are accumulated in float32 (float64 x is rounded to float32
        except by the reference backend). Gradients flow to `x` and `bias`.

    Raises:
        TypeError: if `weight` is not packed or a dtype is not floating.
        ValueError: if shapes or devices disagree, with both values.
    """
    if not isinstance(weight, PackedVQ):
        raise TypeError(f"weight must be a PackedVQ, got {type(weight).__name__}; call pack first")
    layout = weight.layout
    shape = x.shape
    if not shape or shape[-1] != layout.in_features:
        raise ValueError(f"x must be [..., {layout.in_features}], got {list(shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, weight is on {weight.device}")
    if x.dtype not in checks.FLOAT_DTYPES:
        checks.check_float("x", x.dtype)
    if bias is not None:
        checks.check_bias(bias, weight)
    path = _path("vq_linear", x.numel() // layout.in_features, weight)
    if x.requires_grad and torch.is_grad_enabled() and path != "reference":
        dense = vq_dequantize(weight, reference.compute_dtype(x.dtype))
        return F.linear(x.to(dense.dtype), dense, _cast(bias, dense.dtype)).to(x.dtype)
    if path == "cpu_lookup":
        return _cpu().lookup_linear(x, weight, bias)
    if path == "cpu_decode":
        return _cpu().decode_linear(x, weight, bias)
    if path == "reference":
        return reference.vq_linear(x, unpack(weight), bias)
    if path == "triton_gemv":
        return _triton("vq_linear").vq_linear(x, weight, bias)
    return _triton("vq_dequant").decode_linear(x, weight, bias)


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
    return _triton("vq_embedding").vq_embedding(ids, weight, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square over the last dimension.

    Args:
        x: `[..., D]` floating.
        weight: `[D]` floating.
        eps: added to the mean square.

    Returns:
        `[..., D]` in x's dtype, computed in float32.

    Raises:
        ValueError: if `weight` is not `[D]`.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a residual, then normalise the sum.

    Args:
        x: `[..., D]` floating.
        residual: the same shape and dtype.
        weight: `[D]` floating.
        eps: added to the mean square.

    Returns:
        `(normed, x + residual)`, both in x's dtype.

    Raises:
        ValueError: if shapes disagree.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    return reference.add_rms_norm(x, residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the second half of the features with the SiLU of the first half.

    Args:
        gate_up: `[T, 2F]` floating.

    Returns:
        `[T, F]` in the same dtype, computed in float32.

    Raises:
        ValueError: if the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], got an odd width in {list(gate_up.shape)}")
    return reference.swiglu(gate_up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position, halves paired (first with second half).

    Args:
        q: `[T, H, Dh]` floating.
        k: `[T, Hk, Dh]` floating.
        cos: `[T, Dh]` floating.
        sin: `[T, Dh]` floating.

    Returns:
        The rotated `(q, k)` in their dtypes, computed in float32.

    Raises:
        ValueError: if shapes disagree.
    """
    if q.dim() != 3 or cos.shape != (q.shape[0], q.shape[2]) or sin.shape != cos.shape:
        raise ValueError(
            f"q must be [T, H, Dh] with cos and sin [T, Dh], got {list(q.shape)}, "
            f"{list(cos.shape)}, {list(sin.shape)}"
        )
    if k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be [{q.shape[0]}, Hk, {q.shape[2]}], got {list(k.shape)}")
    return reference.rope(q, k, cos, sin)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], causal: bool, scale: float
) -> Tensor:
    """Attend within each sequence of a flat batch, with no cache.

    Neighbouring sequences of one length run as one batched call. Differentiable.

    Args:
        q: `[T, H, Dh]` floating.
        k: `[T, Hk, Dh]`, H a multiple of Hk.
        v: `[T, Hk, Dh]`.
        cu_seqlens: where each sequence starts, and T at the end: (0, ..., T).
        causal: whether a token sees only itself and what is before it.
        scale: multiplies the scores.

    Returns:
        `[T, H, Dh]` in q's dtype.

    Raises:
        ValueError: if shapes disagree or `cu_seqlens` does not rise from 0 to T.
    """
    checks.check_heads(q, k, v)
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0])
    if not q.shape[0]:
        return torch.empty_like(q)
    return reference.varlen_attention(q, k, v, cu_seqlens, causal, scale)


def write_kv(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store new keys and values in the paged caches, in place.

    Args:
        k: `[T, Hk, Dh]` floating.
        v: `[T, Hk, Dh]` floating.
        key_cache: `[num_blocks, block_size, Hk, Dh]`, contiguous; takes its own dtype.
        value_cache: the same shape.
        slot_mapping: `[T]` int64: block * block_size + offset of each token, all different.

    Raises:
        TypeError: if `slot_mapping` is not int64.
        ValueError: if shapes disagree.
    """
    checks.check_write(k, v, key_cache, value_cache, slot_mapping)
    reference.write_kv(k, v, key_cache, value_cache, slot_mapping)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
) -> Tensor:
    """Attend each request's new tokens to its cached tokens, causally: prefill chunks and decode.

    Query i of a request with q_len new tokens sits at position `context_len - q_len + i`. The
    cache must hold the new tokens already (`write_kv`).

    Args:
        q: `[T, H, Dh]` floating: the new tokens of R requests, one after the other.
        key_cache: `[num_blocks, block_size, Hk, Dh]`.
        value_cache: the same shape.
        block_table: `[R, max_blocks]` int32: the blocks of each request, in order.
        cu_seqlens_q: R + 1 offsets into q: (0, ..., T).
        context_lens: R counts of cached tokens, the new ones included.
        scale: multiplies the scores.

    Returns:
        `[T, H, Dh]` in q's dtype.

    Raises:
        TypeError: if `block_table` is not int32.
        ValueError: if shapes or lengths disagree, naming the request.
    """
    checks.check_paged(q, key_cache, value_cache, block_table, cu_seqlens_q, context_lens)
    if not q.shape[0]:
        return torch.empty_like(q)
    return reference.paged_attention(
        q, key_cache, value_cache, block_table, cu_seqlens_q, context_lens, scale
    )


def _path(op: str, rows: int, weight: PackedVQ) -> str:
    """Choose the code path by the order the weight is packed in."""
    if not isinstance(weight, PackedVQ):
        raise TypeError(f"weight must be a PackedVQ or VQWeight, got {type(weight).__name__}")
    order = weight.backend
    wide = order == "cpu" and _cpu().HAS_BYTE_PERMUTE
    return dispatch.choose_backend(
        op, rows, weight.layout, weight.device.type, order == "cpu", order == "triton", wide
    )


@functools.cache
def _cpu() -> Any:
    """Import the cpu backend on first use; later calls cost a dictionary look-up."""
    return importlib.import_module("mgvq_kernels.cpu")


@functools.cache
def _triton(name: str) -> Any:
    """Import one file of the triton backend on first use."""
    return importlib.import_module(f"mgvq_kernels.triton.{name}")


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
