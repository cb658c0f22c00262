"""The front door of everything without codes: norms, gating, rope, attention (part of `ops`).

Callers import these from `ops`. Like there: tensors in, tensors out, `reference.py` says what is
computed, wrong arguments raise with what was expected and what came.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mgvq_kernels import checks, dispatch, reference
from mgvq_kernels.installed import has_numba, has_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square over the last dimension.

    Args:
        x: `[..., D]` floating.
        weight: `[D]` floating.
        eps: added to the mean square.

    Returns:
        `[..., D]` in x's dtype, computed in float32.

    Raises:
        TypeError: if a dtype is not floating.
        ValueError: if `weight` is not `[D]`.
    """
    checks.check_floats(x=x, weight=weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    kernel = _kernel("row_ops", x, weight)
    if kernel is not None and x.shape[-1] <= kernel.MOST_NORM_WIDTH:
        return kernel.rms_norm(x, weight, eps)
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
        TypeError: if a dtype is not floating, or the residual's is not x's.
        ValueError: if shapes disagree.
    """
    checks.check_floats(x=x, weight=weight)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} as x is, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    kernel = _kernel("row_ops", x, residual, weight)
    if kernel is not None and x.shape[-1] <= kernel.MOST_NORM_WIDTH:
        return kernel.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the second half of the features with the SiLU of the first half.

    Args:
        gate_up: `[T, 2F]` floating.

    Returns:
        `[T, F]` in the same dtype, computed in float32.

    Raises:
        TypeError: if the dtype is not floating.
        ValueError: if the last dimension is odd.
    """
    checks.check_floats(gate_up=gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], got an odd width in {list(gate_up.shape)}")
    kernel = _kernel("row_ops", gate_up)
    return (reference if kernel is None else kernel).swiglu(gate_up)


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
        TypeError: if a dtype is not floating.
        ValueError: if shapes disagree or Dh is odd.
    """
    checks.check_rope(q, k, cos, sin)
    kernel = _kernel("rope_write", q, k)
    return (reference if kernel is None else kernel).rope(q, k, cos, sin)


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
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Store new keys and values in the paged caches, in place.

    With scales, each head of a token is rounded to int8 by its largest magnitude over 127.

    Args:
        k: `[T, Hk, Dh]` floating.
        v: `[T, Hk, Dh]` floating.
        key_cache: `[num_blocks, block_size, Hk, Dh]`, contiguous, floating, or int8 with
            `key_scales`; keeps its own dtype.
        value_cache: the same.
        slot_mapping: `[T]` int64: block * block_size + offset of each token, all different.
        key_scales: `[num_blocks, block_size, Hk]` float16, contiguous: takes what int8 keys are to
            be multiplied by.
        value_scales: the same for values.

    Raises:
        TypeError: if `slot_mapping` is not int64 or a cache of the wrong dtype.
        ValueError: if shapes disagree, a cache is not contiguous, or one scale is given alone.
    """
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    checks.check_write(k, v, caches, slot_mapping, scales)
    kernel = None if k.shape[-1] % 2 else _kernel("rope_write", k, v)
    (reference if kernel is None else kernel).write_kv(k, v, *caches, slot_mapping, *scales)


def rope_write_kv(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, then store keys and values: `rope` and `write_kv` in one launch.

    Args:
        q: `[T, H, Dh]` floating; left as it is.
        k: `[T, Hk, Dh]` floating; left as it is.
        v: `[T, Hk, Dh]` floating.
        cos: `[T, Dh]` floating.
        sin: `[T, Dh]` floating.
        key_cache: as in `write_kv`.
        value_cache: as in `write_kv`.
        slot_mapping: as in `write_kv`.
        key_scales: as in `write_kv`.
        value_scales: as in `write_kv`.

    Returns:
        The rotated q in its dtype.

    Raises:
        TypeError: as `write_kv`.
        ValueError: as `rope` and `write_kv`.
    """
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    checks.check_rope(q, k, cos, sin)
    checks.check_write(k, v, caches, slot_mapping, scales)
    kernel = _kernel("rope_write", q, k, v)
    backend = reference if kernel is None else kernel
    return backend.rope_write_kv(q, k, v, cos, sin, *caches, slot_mapping, *scales)


def paged_attention(  # noqa: PLR0913
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Attend each request's new tokens to its cached tokens, causally: prefill chunks and decode.

    Query i of a request with q_len new tokens sits at position `context_len - q_len + i`. The
    cache must hold the new tokens already (`write_kv`). On a GPU in half precision this is
    `paged_attention_decode` where every request brings one token, else `paged_attention_prefill`;
    the lengths are copied there in each call.

    Args:
        q: `[T, H, Dh]` floating: the new tokens of R requests, one after the other.
        key_cache: `[num_blocks, block_size, Hk, Dh]` floating, or int8 with `key_scales`.
        value_cache: the same.
        block_table: `[R, max_blocks]` int32: the blocks of each request, in order.
        cu_seqlens_q: R + 1 offsets into q: (0, ..., T).
        context_lens: R counts of cached tokens, the new ones included.
        scale: multiplies the scores; above 0.
        key_scales: `[num_blocks, block_size, Hk]` float16 that int8 keys are multiplied by.
        value_scales: the same for values.

    Returns:
        `[T, H, Dh]` in q's dtype.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes, lengths or devices disagree, a cache is not contiguous, or (in the
            compiled path of a CPU alone) block_table names a block that is not there.
    """
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    checks.check_paged(q, caches, block_table, cu_seqlens_q, context_lens, scales)
    checks.check_score_scale(scale)
    T, R = q.shape[0], len(context_lens)
    if not T:
        return torch.empty_like(q)
    one_each = cu_seqlens_q == tuple(range(R + 1))
    path = _attention_path(q, key_cache, one_each)
    if path in ("cpu", "reference"):
        backend = reference if path == "reference" else importlib.import_module("mgvq_kernels.cpu")
        return backend.paged_attention(
            q, *caches, block_table, cu_seqlens_q, context_lens, scale, *scales
        )
    table = block_table.contiguous()
    lengths = torch.tensor(context_lens, dtype=torch.int32, device=q.device)
    if path == "triton_decode":
        return paged_attention_decode(q, *caches, table, lengths, scale, *scales)
    offsets = torch.tensor(cu_seqlens_q, dtype=torch.int32, device=q.device)
    return paged_attention_prefill(q, *caches, table, offsets, lengths, scale, *scales)


def paged_attention_prefill(  # noqa: PLR0913
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Attend as `paged_attention`, offsets and lengths read where they lie and not checked.

    In the Triton kernel a row's bits depend on its own query, its position and its context alone:
    not on other requests, nor on how the prompt was cut into chunks. `paged_attention_decode` sums
    in another order, so a token agrees with it within rounding only; so does float32, which takes
    the reference.

    Args:
        q: `[T, H, Dh]` floating: the new tokens of R requests, one after the other.
        key_cache: `[num_blocks, block_size, Hk, Dh]` of q's dtype, or int8 with `key_scales`.
        value_cache: the same.
        block_table: `[R, max_blocks]` int32: the blocks of each request, in order.
        cu_seqlens_q: `[R + 1]` int32 offsets into q, rising from 0 to T.
        context_lens: `[R]` int32 counts of cached tokens, the new ones included.
        scale: multiplies the scores; above 0.
        key_scales: `[num_blocks, block_size, Hk]` float16 that int8 keys are multiplied by.
        value_scales: the same for values.

    Returns:
        `[T, H, Dh]` in q's dtype.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes or devices disagree or a tensor is not contiguous.
    """
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    checks.check_device_lengths(q, caches, block_table, cu_seqlens_q, context_lens, scales)
    checks.check_score_scale(scale)
    if not q.shape[0]:
        return torch.empty_like(q)
    arguments = (*caches, block_table, cu_seqlens_q, context_lens, scale, *scales)
    path = _attention_path(q, key_cache, False)
    if path == "cpu":
        offsets, lengths = tuple(cu_seqlens_q.tolist()), tuple(context_lens.tolist())
        return paged_attention(q, *caches, block_table, offsets, lengths, scale, *scales)
    if path == "reference":
        return reference.paged_attention_prefill(q, *arguments)
    kernel = importlib.import_module("mgvq_kernels.triton.paged_prefill")
    return kernel.paged_attention_prefill(q.contiguous(), *arguments)


def paged_attention_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Attend one new token a request to its cached tokens, lengths read where they lie.

    What `paged_attention` computes for single tokens, for a captured graph: the launch depends on
    the width of `block_table` alone. A GPU and half precision take the Triton kernel; a request's
    result then depends on no other request.

    Args:
        q: `[R, H, Dh]` floating.
        key_cache: `[num_blocks, block_size, Hk, Dh]` of q's dtype, or int8 with `key_scales`.
        value_cache: the same.
        block_table: `[R, max_blocks]` int32: the blocks of each request, in order.
        context_lens: `[R]` int32 counts of cached tokens, at least 1, the new one included.
        scale: multiplies the scores; above 0.
        key_scales: `[num_blocks, block_size, Hk]` float16 that int8 keys are multiplied by.
        value_scales: the same for values.

    Returns:
        `[R, H, Dh]` in q's dtype.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes or devices disagree or a tensor is not contiguous.
    """
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    checks.check_device_lengths(q, caches, block_table, None, context_lens, scales)
    checks.check_score_scale(scale)
    arguments = (*caches, block_table, context_lens, scale, *scales)
    path = _attention_path(q, key_cache, True)
    if path == "cpu":
        offsets, lengths = tuple(range(q.shape[0] + 1)), tuple(context_lens.tolist())
        return paged_attention(q, *caches, block_table, offsets, lengths, scale, *scales)
    if path == "reference":
        return reference.paged_attention_decode(q, *arguments)
    kernel = importlib.import_module("mgvq_kernels.triton.paged_attention")
    return kernel.paged_attention_decode(q.contiguous(), *arguments)


def _attention_path(q: Tensor, key_cache: Tensor, one_token_each: bool) -> str:
    """Choose the path of attention over a paged cache."""
    if key_cache.dtype not in (q.dtype, torch.int8):
        return "reference"
    if q.is_cuda and q.shape[2] < dispatch.LEAST_HEAD_DIM:
        return "reference"
    numba, triton = q.is_cpu and has_numba(), q.is_cuda and has_triton()
    return dispatch.choose_attention(q.device.type, q.dtype, one_token_each, numba, triton)


def _kernel(name: str, *tensors: Tensor) -> ModuleType | None:
    """Import a Triton file where a GPU holds half-precision tensors and wants no gradient."""
    first = tensors[0]
    if not first.is_cuda or first.element_size() != 2 or not has_triton():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    return importlib.import_module(f"mgvq_kernels.triton.{name}")
