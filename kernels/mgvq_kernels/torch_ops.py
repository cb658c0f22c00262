"""The front door as torch custom ops (imported by callers of torch.compile and torch.export).

Importing registers `torch.ops.mgvq.*` and does nothing else. Each op is a call of its namesake in
`ops` with a fake that knows the result's shape. Eager code calls `ops` itself: the dispatcher costs
microseconds a call. A `PackedVQ` travels flat, as `flatten` makes it. No gradients.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import CODECS, Band, PackedVQ, Stage, VQLayout


def flatten(weight: PackedVQ) -> tuple[list[Tensor], str, list[int]]:
    """Take a packed weight apart into what a custom op can be given.

    Args:
        weight: in any backend's order.

    Returns:
        Its tensors by rising name, the backend with those names, and its layout as numbers: O, I,
        whether permuted, then width and count of stages of each band, and vector dimension, codec
        (its place in `CODECS`), rate and window of each stage.
    """
    names = sorted(weight.tensors)
    layout = weight.layout
    numbers = [layout.out_features, layout.in_features, int(layout.has_permutation)]
    for band in layout.bands:
        numbers += [band.width, len(band.stages)]
        for stage in band.stages:
            codec = CODECS.index(stage.codec)
            numbers += [stage.vector_dim, codec, stage.rate, stage.window]
    return [weight.tensors[name] for name in names], " ".join((weight.backend, *names)), numbers


def unflatten(tensors: list[Tensor], names: str, numbers: list[int]) -> PackedVQ:
    """Put together what `flatten` took apart; the tensors are shared, not copied."""
    out_features, in_features, is_permuted, *rest = numbers
    bands, start, places = [], 0, iter(rest)
    for width in places:
        stages = []
        for _ in range(next(places)):
            dim, codec, rate, window = itertools.islice(places, 4)
            stages.append(Stage(dim, CODECS[codec], rate, window))
        bands.append(Band(start, width, tuple(stages)))
        start += width
    layout = VQLayout(out_features, in_features, tuple(bands), bool(is_permuted))
    backend, *keys = names.split(" ")
    return PackedVQ(backend, layout, tensors[0].device, dict(zip(keys, tensors, strict=True)))


@torch.library.custom_op("mgvq::vq_linear", mutates_args=())
def vq_linear(
    x: Tensor,
    tensors: list[Tensor],
    names: str,
    numbers: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """Run `ops.vq_linear` on a flattened weight."""
    y = ops.vq_linear(x, unflatten(tensors, names, numbers), bias, residual, gated)
    return y.contiguous()


@vq_linear.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    names: str,
    numbers: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], numbers[0])


@torch.library.custom_op("mgvq::vq_embedding", mutates_args=())
def vq_embedding(
    ids: Tensor, tensors: list[Tensor], names: str, numbers: list[int], dtype: torch.dtype
) -> Tensor:
    """Run `ops.vq_embedding` on a flattened table."""
    return ops.vq_embedding(ids, unflatten(tensors, names, numbers), dtype).contiguous()


@vq_embedding.register_fake
def _(
    ids: Tensor, tensors: list[Tensor], names: str, numbers: list[int], dtype: torch.dtype
) -> Tensor:
    return ids.new_empty(ids.shape[0], numbers[1], dtype=dtype)


@torch.library.custom_op("mgvq::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run `ops.rms_norm`."""
    return ops.rms_norm(x, weight, eps).contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mgvq::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Run `ops.add_rms_norm`."""
    normed, total = ops.add_rms_norm(x, residual, weight, eps)
    return normed.contiguous(), total.contiguous()


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("mgvq::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """Run `ops.swiglu`."""
    return ops.swiglu(gate_up).contiguous()


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("mgvq::rope", mutates_args=())
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Run `ops.rope`; the results are two tensors, not two views of one."""
    turned_q, turned_k = ops.rope(q, k, cos, sin)
    return turned_q.contiguous(), turned_k.clone(memory_format=torch.contiguous_format)


@rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")
"""Arguments that the ops below write to."""


@torch.library.custom_op("mgvq::write_kv", mutates_args=CACHES)
def write_kv(
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Run `ops.write_kv`, which changes caches and scales in place."""
    ops.write_kv(k, v, key_cache, value_cache, slot_mapping, key_scales, value_scales)


@torch.library.custom_op("mgvq::rope_write_kv", mutates_args=CACHES)
def rope_write_kv(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Run `ops.rope_write_kv`, which changes caches and scales in place."""
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    return ops.rope_write_kv(q, k, v, cos, sin, *caches, slot_mapping, *scales).contiguous()


@rope_write_kv.register_fake
def _(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("mgvq::paged_attention_decode", mutates_args=())
def paged_attention_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Run `ops.paged_attention_decode`."""
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    y = ops.paged_attention_decode(q, *caches, block_table, context_lens, scale, *scales)
    return y.contiguous()


@paged_attention_decode.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)
