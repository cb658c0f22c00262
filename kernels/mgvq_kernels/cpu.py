"""Linear, embedding and attention on a CPU (called by `ops`, which has checked arguments).

Few rows go through the partial-sum lookup of `cpu_lookup`, or of `cpu_lookup_rows` eight at a time;
for many rows the matrix is decoded into a small buffer, and torch multiplies. Large work is cut by
output rows, or by request and head, over as many threads as torch may use; the result does not
depend on their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import (
    cpu_attention,
    cpu_decode,
    cpu_lookup,
    cpu_lookup_rows,
    cpu_trellis,
    reference,
)
from mgvq_kernels.cpu_order import STRIP_ROWS
from mgvq_kernels.cpu_threads import over_threads
from mgvq_kernels.layout import CODECS, PackedVQ, VQLayout, VQWeight
from mgvq_kernels.packing import pack

THREAD_CODES = 1 << 20
"""Codes (times rows of x) below which a call stays on its own thread: about 100 us of work, where
handing a part to another thread costs 20 to 50 us."""

TRELLIS_CODES = 4
"""Looked up codes that a weight of a trellis costs as much as, for `THREAD_CODES`."""

THREAD_PRODUCTS = 1 << 20
"""Products of queries and keys below which attention stays on its own thread."""

HAS_BYTE_PERMUTE = cpu_lookup.HAS_VBMI
"""Whether the lookup handles 64 codes at a time here; `dispatch` asks."""

CHUNK_FLOATS = 1 << 18
"""Decoded weights held at once when many rows are multiplied: 1 MiB, one core's L2 cache."""


def lookup_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply few rows `x [..., I]` straight from codes: `[..., O]` in x's dtype."""
    wide = x if x.dtype is torch.float32 and x.is_contiguous() else _float32(x)
    layout = weight.layout
    y = wide.new_empty((*x.shape[:-1], layout.out_features))
    bias = None if bias is None else _float32(bias)
    rows = wide.numel() // layout.in_features
    x_address, y_address, address = wide.data_ptr(), y.data_ptr(), weight.address
    bias_address = 0 if bias is None else bias.data_ptr()
    strips, codes = weight.strips, rows * weight.num_codes
    is_alone = rows == 1 or HAS_BYTE_PERMUTE
    lookup = cpu_lookup.lookup if is_alone else cpu_lookup_rows.lookup_rows
    if codes < THREAD_CODES:  # the hot path of small models: nothing between here and the kernel
        lookup(x_address, y_address, bias_address, rows, address, 0, strips)
    else:
        _over_strips(
            lambda first, last: lookup(
                x_address, y_address, bias_address, rows, address, first, last
            ),
            0,
            strips,
            codes,
        )
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def trellis_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply few rows `x [..., I]` while the trellis is decoded: `[..., O]` in x's dtype."""
    wide, layout = _float32(x), weight.layout
    y = wide.new_empty((*x.shape[:-1], layout.out_features))
    bias = None if bias is None else _float32(bias)
    rows = wide.numel() // layout.in_features
    x_address, y_address, address = wide.data_ptr(), y.data_ptr(), weight.address
    bias_address = 0 if bias is None else bias.data_ptr()
    _over_strips(
        lambda first, last: cpu_trellis.multiply(
            x_address, y_address, bias_address, rows, address, first, last
        ),
        0,
        weight.strips,
        TRELLIS_CODES * rows * layout.num_weights,
    )
    return y.to(x.dtype)


def decode_linear(x: Tensor, weight: PackedVQ, bias: Tensor | None) -> Tensor:
    """Multiply many rows `x [..., I]` by the decoded matrix: `[..., O]` in x's dtype.

    The matrix is decoded a few rows at a time into one small buffer that stays in the cache.
    """
    layout = weight.layout
    out_features, in_features = layout.out_features, layout.in_features
    rows = _float32(x).reshape(-1, in_features)  # [T, I]
    columns = _columns(weight)
    if columns is not None:
        rows = rows.index_select(1, columns)
    y = torch.empty(rows.shape[0], out_features)
    strips = weight.strips
    chunk = max(cpu_lookup.WIDE_STRIPS, CHUNK_FLOATS // (STRIP_ROWS * in_features))
    buffer = torch.empty(min(chunk, strips) * STRIP_ROWS, in_features)
    for first in range(0, strips, chunk):
        begin, end = first * STRIP_ROWS, min(out_features, (first + chunk) * STRIP_ROWS)
        dense = buffer[: end - begin]
        _decode_into(dense, weight, first, min(strips, first + chunk))
        torch.mm(rows, dense.t(), out=y[:, begin:end])
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def decode(weight: PackedVQ) -> Tensor:
    """Decode a matrix: `[O, I]` float32, columns in the order of the packed weight."""
    layout = weight.layout
    dense = torch.empty(layout.out_features, layout.in_features)
    _decode_into(dense, weight, 0, weight.strips)
    return dense


def dequantize(weight: PackedVQ) -> Tensor:
    """Decode a matrix: `[O, I]` float32 in original channel order."""
    dense = decode(weight)
    columns = _columns(weight)
    if columns is None:
        return dense
    return torch.empty_like(dense).index_copy_(1, columns.long(), dense)


def embedding(ids: Tensor, weight: PackedVQ) -> Tensor:
    """Decode the rows `ids [T]` int64: `[T, I]` float32."""
    ids = ids.contiguous()
    out = torch.empty(ids.numel(), weight.layout.in_features)
    kernels = _decoder(weight)
    kernels.take_rows(ids.data_ptr(), ids.numel(), out.data_ptr(), weight.address)
    return out


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
    """Attend single tokens by the kernel, longer chunks one by one by torch: `[T, H, Dh]`.

    Float32, over caches of float32 or of int8 with scales; a request's result depends on no other.
    """
    q, table = q.contiguous(), block_table.contiguous()
    out = torch.empty_like(q)
    caches, scales = (key_cache, value_cache), (key_scales, value_scales)
    pointers = [tensor.data_ptr() for tensor in (q, out, table, *caches)]
    pointers += [0 if one is None else one.data_ptr() for one in scales]
    shapes = (*q.shape, *table.shape, *key_cache.shape[:3])
    plan = torch.tensor([*pointers, *shapes, 0, *cu_seqlens_q, *context_lens])
    address = plan.data_ptr()
    over_threads(
        lambda first, last: cpu_attention.paged_attention_decode(address, scale, first, last),
        0,
        table.shape[0] * key_cache.shape[2],
        1,
        sum(context_lens) * q.shape[1] * q.shape[2] >= THREAD_PRODUCTS,
    )
    if row := int(plan[cpu_attention.FOUND_NO_BLOCK]):
        raise ValueError(
            f"block_table names a block outside [0, {key_cache.shape[0]}) for request {row - 1}: "
            f"{block_table[row - 1].tolist()}"
        )
    if q.shape[0] > len(context_lens):
        for r, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q)):
            if end - begin > 1:
                out[begin:end] = reference.paged_attention(
                    q[begin:end],
                    *caches,
                    table[r : r + 1],
                    (0, end - begin),
                    context_lens[r : r + 1],
                    scale,
                    *scales,
                )
    return out


def warm_up() -> None:
    """Compile every kernel, or load it from the disk cache."""
    for codec in CODECS:
        packed = pack(_zeros(VQLayout.uniform(64, 32, 2, codec=codec)), "cpu")
        multiply = lookup_linear if codec == "lookup" else trellis_linear
        multiply(torch.zeros(1, 32), packed, None)
        multiply(torch.zeros(2, 32), packed, None)
        decode(packed)
        embedding(torch.zeros(1, dtype=torch.int64), packed)
    q, table = torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.int32)
    cache, scales = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, dtype=torch.float16)
    paged_attention(q, cache, cache, table, (0, 1), (1,), 1.0, None, None)
    codes = cache.to(torch.int8)
    paged_attention(q, codes, codes, table, (0, 1), (1,), 1.0, scales, scales)


def _zeros(layout: VQLayout) -> VQWeight:
    """Make a weight of one band of one stage, all of it zero."""
    (stage,) = layout.bands[0].stages
    return VQWeight(
        layout,
        codes=((torch.zeros(layout.code_shape(0, 0), dtype=torch.uint8),),),
        codebooks=((torch.zeros(stage.codebook_size, stage.vector_dim, dtype=torch.int8),),),
        codebook_scales=((torch.tensor(1.0),),),
        scales=torch.ones(layout.out_features, dtype=torch.float16),
    )


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _decode_into(dense: Tensor, weight: PackedVQ, first: int, last: int) -> None:
    """Decode the strips first..last of a matrix into `dense`, whose first row is theirs."""
    # The kernel counts rows from the matrix's start, so it is told where that would lie.
    origin = dense.data_ptr() - first * STRIP_ROWS * dense.shape[1] * 4
    address, layout = weight.address, weight.layout
    kernels = _decoder(weight)
    of_row = TRELLIS_CODES * layout.in_features if kernels is cpu_trellis else layout.codes_per_row
    _over_strips(
        lambda low, high: kernels.decode(origin, address, low, high),
        first,
        last,
        (last - first) * STRIP_ROWS * of_row,
    )


def _decoder(weight: PackedVQ) -> Any:
    """Return the file with `decode` and `take_rows` for how a weight is coded."""
    return cpu_decode if weight.layout.codec == "lookup" else cpu_trellis


def _columns(weight: PackedVQ) -> Tensor | None:
    """Name the input channel of each column that `decode` makes: `[I]` int32, None if the same."""
    return weight.tensors.get("order", weight.tensors.get("permutation"))


def _over_strips(run: Callable[[int, int], None], first: int, last: int, codes: int) -> None:
    """Cut the strips first..last into equal runs, one a thread, the first on the calling thread.

    Little work (by the number of codes) stays on the calling thread. Runs are multiples of the
    strips one kernel pass serves, so that no thread works in half passes.
    """
    over_threads(run, first, last, cpu_lookup.WIDE_STRIPS, codes >= THREAD_CODES)
