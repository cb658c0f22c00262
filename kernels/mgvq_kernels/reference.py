"""Plain torch of every op: the specification, and the fallback on any device (called by `ops`).

Everything is computed in float32 (float64 where the input is float64) and cast once at the end.
Arguments are not checked here: `ops` does that. Gradients flow to activations; codes have none.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mgvq_kernels import trellis
from mgvq_kernels.layout import Stage, VQWeight


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype an op computes in: float64 stays, the rest is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def permuted_matrix(weight: VQWeight, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """Decode the codes, of some rows `[T]` int64 if they are named, computed in at least float32.

    Returns:
        `[O, I]`, or `[T, I]`, in permuted channel order.
    """
    bands = []
    wide = compute_dtype(dtype)
    scales = weight.scales if rows is None else weight.scales[rows]
    for b, band in enumerate(weight.layout.bands):
        total = torch.zeros((), dtype=wide, device=weight.scales.device)
        for s, stage in enumerate(band.stages):
            table = weight.codebooks[b][s].to(wide) * weight.codebook_scales[b][s].to(
                wide
            )  # [2^window, d]
            entries = _entries(weight.codes[b][s], stage, rows)  # [O, width/d]
            total = total + F.embedding(entries, table).flatten(1)  # [O, width]
        bands.append(total)
    matrix = torch.cat(bands, dim=1)  # [O, I]
    return (matrix * scales.to(wide)[:, None]).to(dtype)


def vq_dequantize(weight: VQWeight, dtype: torch.dtype) -> Tensor:
    """Decode a weight to the dense matrix in original channel order: `[O, I]`."""
    return _original_order(permuted_matrix(weight, dtype), weight.permutation)


def vq_linear(x: Tensor, weight: VQWeight, bias: Tensor | None) -> Tensor:
    """Multiply `x [..., I]` by a weight `[O, I]`: `[..., O]` in x's dtype."""
    wide = compute_dtype(x.dtype)
    dense = vq_dequantize(weight, wide)
    return F.linear(x.to(wide), dense, None if bias is None else bias.to(wide)).to(x.dtype)


def vq_linear_int8(x: Tensor, weight: VQWeight) -> Tensor:
    """Multiply `x [T, I]`, rounded to int8, by a weight: `[T, O]` float64; the integer oracle.

    A run of 128 channels (fewer where a stage's vectors are shorter than the matrix's longest, or
    at the end of a band) shares a scale, its largest magnitude over 127. Products and sums inside a
    run are exact integers.
    """
    if weight.permutation is not None:
        x = x[:, weight.permutation.long()]
    longest = max(4, *(stage.vector_dim for band in weight.layout.bands for stage in band.stages))
    groups = 128 // longest  # of a run
    total = torch.zeros(x.shape[0], weight.layout.out_features, dtype=torch.float64)
    for b, band in enumerate(weight.layout.bands):
        channels = x[:, band.start : band.start + band.width].float()
        for s, stage in enumerate(band.stages):
            width = groups * stage.vector_dim
            book = weight.codebooks[b][s].double()
            entries = F.embedding(weight.codes[b][s].long(), book).flatten(1)  # [O, width]
            scale = weight.codebook_scales[b][s].double()
            for run, part in zip(
                torch.split(channels, width, 1), torch.split(entries, width, 1), strict=True
            ):
                top = run.abs().amax(1, keepdim=True)  # [T, 1]
                rounded = (run * torch.where(top > 0, 127.0 / top, 0.0)).round()
                total += (rounded.double() @ part.T) * (top / 127.0).double() * scale
    return total * weight.scales.double()


def vq_embedding(ids: Tensor, weight: VQWeight, dtype: torch.dtype) -> Tensor:
    """Decode the rows `ids [T]` of a weight: `[T, I]`."""
    return _original_order(permuted_matrix(weight, dtype, ids), weight.permutation)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise `x [..., D]` by its root mean square and scale by `weight [D]`."""
    wide = compute_dtype(x.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(first half) * second half` of `gate_up [T, 2F]`: `[T, F]`."""
    gate, up = gate_up.to(compute_dtype(gate_up.dtype)).chunk(2, dim=-1)  # [T, F] each
    return (F.silu(gate) * up).to(gate_up.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `q [T, H, Dh]` and `k [T, Hk, Dh]` by `cos, sin [T, Dh]`, halves paired."""
    wide = compute_dtype(q.dtype)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)  # [T, 1, Dh]
    both = torch.cat((q, k), dim=1).to(wide)  # [T, H + Hk, Dh]: half the ops of one after the other
    first, second = both.chunk(2, dim=-1)
    turned = both * cos + torch.cat((-second, first), dim=-1) * sin
    heads = q.shape[1]
    return turned[:, :heads].to(q.dtype), turned[:, heads:].to(k.dtype)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], causal: bool, scale: float
) -> Tensor:
    """Attend within each sequence of a flat batch; equal neighbours run as one batched call."""
    outputs = []
    start = 0
    lengths = [end - begin for begin, end in itertools.pairwise(cu_seqlens)]
    for length, run in itertools.groupby(lengths):
        count = len(list(run))
        stop = start + count * length
        if length:
            queries, keys, values = (_batched(part[start:stop], count) for part in (q, k, v))
            outputs.append(_unbatched(_attend(queries, keys, values, None, causal, scale)))
        start = stop
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]  # [T, H, Dh]


def write_kv(
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Store `k, v [T, Hk, Dh]` at the flat slots `slot_mapping [T]`; as int8 where scales are."""
    for x, cache, scales in ((k, key_cache, key_scales), (v, value_cache, value_scales)):
        if scales is not None:
            x, scale = quantize_heads(x)
            scales.view(-1, scales.shape[2]).index_copy_(0, slot_mapping, scale)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, x.to(cache.dtype))


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
    """Rotate q and k, store k and v; return q."""
    q, k = rope(q, k, cos, sin)
    write_kv(k, v, key_cache, value_cache, slot_mapping, key_scales, value_scales)
    return q


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x [T, Hk, Dh]` to int8 with a float16 scale a vector: `[T, Hk, Dh]`, `[T, Hk]`.

    The scale is the largest magnitude over 127, and codes are rounded by what float16 made of it.
    A vector of zeros, or one too small for float16, has codes and scale 0. One that is not finite
    has a scale that is not finite, and codes 0: multiplied out it is NaN.
    """
    wide = x.to(compute_dtype(x.dtype))
    scale = (wide.abs().amax(dim=-1) / 127).to(torch.float16)  # [T, Hk]
    step = scale.to(wide.dtype).unsqueeze(-1)  # [T, Hk, 1]
    is_usable = (step > 0) & step.isfinite()
    codes = (wide / torch.where(is_usable, step, 1.0)).round().clamp(-127, 127)
    return torch.where(is_usable, codes, 0.0).to(torch.int8), scale


def paged_attention(  # noqa: PLR0913
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Attend each request's queries to its cached tokens; query i sits at `context - q_len + i`."""
    outputs = []
    block_size = key_cache.shape[1]
    q_lens = [end - begin for begin, end in itertools.pairwise(cu_seqlens_q)]
    first = 0
    for (q_len, context), run in itertools.groupby(zip(q_lens, context_lens, strict=True)):
        count = len(list(run))
        if q_len:
            blocks = block_table[first : first + count, : -(-context // block_size)]
            blocks = blocks.flatten().long()
            keys = _pages(key_cache, key_scales, blocks, count, context)  # [n, Hk, S, Dh]
            values = _pages(value_cache, value_scales, blocks, count, context)
            start = cu_seqlens_q[first]
            queries = _batched(q[start : start + count * q_len], count)  # [n, H, q_len, Dh]
            causal = q_len == context
            mask = None if q_len == 1 or causal else _causal_mask(q_len, context, q.device)
            outputs.append(_unbatched(_attend(queries, keys, values, mask, causal, scale)))
        first += count
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]  # [T, H, Dh]


def paged_attention_prefill(  # noqa: PLR0913
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Attend as `paged_attention`, offsets and lengths in tensors."""
    offsets, lengths = tuple(cu_seqlens_q.tolist()), tuple(context_lens.tolist())
    return paged_attention(
        q, key_cache, value_cache, block_table, offsets, lengths, scale, key_scales, value_scales
    )


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
    """Attend `q [R, H, Dh]`, a token a request: `paged_attention`, lengths in a tensor."""
    offsets, lengths = tuple(range(q.shape[0] + 1)), tuple(context_lens.tolist())
    return paged_attention(
        q, key_cache, value_cache, block_table, offsets, lengths, scale, key_scales, value_scales
    )


def _entries(codes: Tensor, stage: Stage, rows: Tensor | None) -> Tensor:
    """Name the codebook entry of every vector, of some rows if they are named: `[O, width/d]`."""
    if stage.codec == "lookup":
        return (codes if rows is None else codes[rows]).long()
    if rows is None:
        return trellis.windows(codes, stage.rate, stage.window)
    return trellis.row_windows(codes, rows, stage.rate, stage.window)


def _original_order(matrix: Tensor, permutation: Tensor | None) -> Tensor:
    """Undo the permutation of the columns of `[T, I]`."""
    if permutation is None:
        return matrix
    dense = torch.empty_like(matrix)
    dense[:, permutation.long()] = matrix
    return dense


def _batched(x: Tensor, count: int) -> Tensor:
    """View `[n * S, H, Dh]` as `[n, H, S, Dh]`."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


def _unbatched(x: Tensor) -> Tensor:
    """Flatten `[n, H, S, Dh]` to `[n * S, H, Dh]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _pages(
    cache: Tensor, scales: Tensor | None, blocks: Tensor, count: int, context: int
) -> Tensor:
    """Gather the pages of `count` requests of one length, int8 ones scaled: `[n, Hk, S, Dh]`."""
    pages = cache.index_select(0, blocks)  # [n * blocks, block_size, Hk, Dh]
    if scales is not None:
        pages = pages.float() * scales.index_select(0, blocks).float().unsqueeze(-1)
    return pages.view(count, -1, *cache.shape[2:])[:, :context].transpose(1, 2)


def _causal_mask(q_len: int, context: int, device: torch.device) -> Tensor:
    """True where query i may see key j: `[q_len, context]` bool."""
    places = torch.arange(context - q_len, context, device=device)
    return torch.arange(context, device=device)[None, :] <= places[:, None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attend on `[n, H, S, Dh]`, grouped heads shared.

    Computed in at least float32; on a GPU in q's dtype, whose kernels accumulate in float32.
    """
    wide = q.dtype if q.is_cuda else compute_dtype(q.dtype)
    out = F.scaled_dot_product_attention(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        attn_mask=mask,
        is_causal=causal and q.shape[2] > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.to(q.dtype)
