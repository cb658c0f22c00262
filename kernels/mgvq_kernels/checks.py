"""What the front door asks of its arguments (called by `ops`).

Each check names the argument, what was expected and what came. Looks at shapes, dtypes and devices
only, never at values on a device.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mgvq_kernels.layout import PackedVQ

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of activations every op takes."""


def check_float(name: str, dtype: torch.dtype) -> None:
    """Ask for a floating dtype."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be one of {FLOAT_DTYPES}, got {dtype}")


def check_floats(**tensors: Tensor) -> None:
    """Ask for tensors of floating dtypes, by their names."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            check_float(name, tensor.dtype)


def check_linear(
    x: Tensor, weight: PackedVQ, bias: Tensor | None, residual: Tensor | None, gated: bool
) -> None:
    """Ask for activations, bias and residual that go with a packed weight."""
    if not isinstance(weight, PackedVQ):
        raise TypeError(f"weight must be a PackedVQ, got {type(weight).__name__}; call pack first")
    layout = weight.layout
    shape, width = x.shape, 2 * layout.in_features if gated else layout.in_features
    if not shape or shape[-1] != width:
        raise ValueError(f"x must be [..., {width}], got {list(shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, weight is on {weight.device}")
    if x.dtype not in FLOAT_DTYPES:
        check_float("x", x.dtype)
    if bias is not None:
        check_bias(bias, weight)
    if residual is not None:
        check_residual(residual, x, layout.out_features)


def check_bias(bias: Tensor, weight: PackedVQ) -> None:
    """Ask for one number per output row of the weight, on its device."""
    if bias.shape != (weight.layout.out_features,):
        raise ValueError(f"bias must be [{weight.layout.out_features}], got {list(bias.shape)}")
    if bias.dtype not in FLOAT_DTYPES:
        check_float("bias", bias.dtype)
    if bias.device != weight.device:
        raise ValueError(f"bias is on {bias.device}, weight is on {weight.device}")


def check_residual(residual: Tensor, x: Tensor, out_features: int) -> None:
    """Ask for what can be added to the product of x and a weight, in x's dtype and place."""
    shape = (*x.shape[:-1], out_features)
    if residual.shape != shape:
        raise ValueError(f"residual must be {list(shape)}, got {list(residual.shape)}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise TypeError(
            f"residual must be {x.dtype} on {x.device} as x is, got {residual.dtype} on "
            f"{residual.device}"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Ask for q, k, v of the same tokens, with query heads a multiple of key heads."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"q must be [T, H, Dh], k and v [T, Hk, Dh], got {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} does not go with k {list(k.shape)}")


def check_cu_seqlens(name: str, offsets: tuple[int, ...], tokens: int) -> None:
    """Ask for offsets that rise from 0 to the number of tokens."""
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"{name} must run from 0 to {tokens}, got {tuple(offsets)}")
    if any(end < start for start, end in itertools.pairwise(offsets)):
        raise ValueError(f"{name} must not fall, got {tuple(offsets)}")


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Ask for queries and keys of the same tokens, heads of even width and an angle a pair."""
    check_floats(q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 3 or cos.shape != (q.shape[0], q.shape[2]) or sin.shape != cos.shape:
        raise ValueError(
            f"q must be [T, H, Dh] with cos and sin [T, Dh], got {list(q.shape)}, "
            f"{list(cos.shape)}, {list(sin.shape)}"
        )
    if k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be [{q.shape[0]}, Hk, {q.shape[2]}], got {list(k.shape)}")
    if q.shape[2] % 2:
        raise ValueError(f"Dh must be even, its halves are paired; got {q.shape[2]}")


def check_write(
    k: Tensor,
    v: Tensor,
    caches: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Ask for new keys and values that go into the caches at as many slots."""
    if slot_mapping.dtype != torch.int64:
        raise TypeError(f"slot_mapping must be int64, got {slot_mapping.dtype}")
    if k.dim() != 3 or k.shape != v.shape or slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            f"k, v must be [T, Hk, Dh] and slot_mapping [T], got {list(k.shape)}, {list(v.shape)}, "
            f"{list(slot_mapping.shape)}"
        )
    key_cache, value_cache = caches
    if (
        key_cache.dim() != 4
        or key_cache.shape[2:] != k.shape[1:]
        or key_cache.shape != value_cache.shape
    ):
        raise ValueError(
            f"caches must be [num_blocks, block_size, {k.shape[1]}, {k.shape[2]}], got "
            f"{list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    check_caches(caches, scales, None)


def check_caches(
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype | None,
) -> None:
    """Ask for two contiguous caches of `dtype` (None: one floating), or int8 ones with scales."""
    if (scales[0] is None) != (scales[1] is None):
        raise ValueError("key_scales and value_scales must both be given, or neither")
    for name, cache, scale in zip(("key", "value"), caches, scales, strict=True):
        asked = "" if scale is None else f", as {name}_scales is given"
        if scale is None and dtype is None:
            check_float(f"{name}_cache without {name}_scales", cache.dtype)
            if cache.dtype != caches[0].dtype:
                raise TypeError(f"value_cache is {cache.dtype}, key_cache {caches[0].dtype}")
        elif cache.dtype != (expected := dtype if scale is None else torch.int8):
            raise TypeError(f"{name}_cache must be {expected}{asked}, got {cache.dtype}")
        if cache.dim() != 4 or cache.shape != caches[0].shape or not cache.is_contiguous():
            raise ValueError(
                f"{name}_cache must be contiguous [num_blocks, block_size, Hk, Dh] and like the "
                f"other, got {list(cache.shape)} with strides {list(cache.stride())}"
            )
        if cache.device != caches[0].device:
            raise ValueError(f"value_cache is on {cache.device}, key_cache on {caches[0].device}")
        if scale is None:
            continue
        if scale.device != cache.device:
            raise ValueError(f"{name}_scales is on {scale.device}, its cache on {cache.device}")
        if (
            scale.shape != cache.shape[:3]
            or scale.dtype != torch.float16
            or not scale.is_contiguous()
        ):
            raise ValueError(
                f"{name}_scales must be contiguous {list(cache.shape[:3])} float16, got "
                f"{list(scale.shape)} {scale.dtype} with strides {list(scale.stride())}"
            )


def check_score_scale(scale: float) -> None:
    """Ask for a factor that keeps what is masked, minus infinity, where it is."""
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale}")


def check_paged(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    block_table: Tensor,
    cu_seqlens_q: tuple[int, ...],
    context_lens: tuple[int, ...],
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Ask for caches, tables and lengths that tell one story about every request."""
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    requests = len(cu_seqlens_q) - 1
    if block_table.dim() != 2 or block_table.shape[0] != requests or len(context_lens) != requests:
        raise ValueError(
            f"cu_seqlens_q names {requests} requests, block_table is {list(block_table.shape)}, "
            f"context_lens has {len(context_lens)}"
        )
    check_caches(caches, scales, None)
    _check_query(q, caches[0])
    room = block_table.shape[1] * caches[0].shape[1]
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q)):
        if not end - start <= context_lens[i] <= room:
            raise ValueError(
                f"request {i}: context_len {context_lens[i]} must hold its {end - start} new "
                f"tokens and fit the {room} slots of block_table"
            )


def check_device_lengths(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    block_table: Tensor,
    cu_seqlens_q: Tensor | None,
    context_lens: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Ask for tables and lengths in tensors; without offsets q has one token a request."""
    requests = q.shape[0] if cu_seqlens_q is None else context_lens.numel()
    asked = {
        "block_table": (block_table, (requests, block_table.shape[-1])),
        "context_lens": (context_lens, (requests,)),
    }
    if cu_seqlens_q is not None:
        asked["cu_seqlens_q"] = (cu_seqlens_q, (requests + 1,))
    for name, (tensor, shape) in asked.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)} for {requests} requests, got "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}")
    check_caches(caches, scales, q.dtype)
    _check_query(q, caches[0])


def _check_query(q: Tensor, cache: Tensor) -> None:
    if q.dim() != 3 or q.shape[2] != cache.shape[3] or q.shape[1] % cache.shape[2]:
        raise ValueError(f"q {list(q.shape)} does not go with a cache {list(cache.shape)}")
    if q.device != cache.device:
        raise ValueError(f"q is on {q.device}, the caches are on {cache.device}")
