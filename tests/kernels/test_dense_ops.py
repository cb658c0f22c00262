"""Norms, rope, gating and attention against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mgvq_kernels import ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int | None, scale: float
) -> torch.Tensor:
    """One sequence, softmax written out; query i sees keys up to first + i (None: all)."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))  # [H, S, Dh]
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale  # [H, Sq, Sk]
    if first is not None:
        seen = torch.arange(k.shape[1]) <= first + torch.arange(q.shape[1])[:, None]
        scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)  # [Sq, H, Dh]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 96).to(dtype) * 3, torch.rand(96).to(dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    y = ops.rms_norm(x, weight, 1e-6)
    assert y.dtype == dtype
    assert (y - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()
    normed, total = ops.add_rms_norm(x, x, weight, 1e-6)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, ops.rms_norm(x + x, weight, 1e-6))
    # 300 squared passes the largest half: the sum must be taken in float32.
    assert ops.rms_norm(torch.full((1, 96), 300.0).half(), weight.half(), 1e-6).isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    truth = gate / (1 + (-gate).exp()) * up
    assert (ops.swiglu(x) - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rope_turns_pairs(dtype: torch.dtype) -> None:
    """Halves are the real and imaginary part; position 0 changes nothing."""
    q, k = torch.randn(4, 6, 16).to(dtype), torch.randn(4, 2, 16).to(dtype)
    angles = torch.arange(4.0)[:, None] * torch.rand(8)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    for x, y in zip((q, k), ops.rope(q, k, cos, sin), strict=True):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(
            torch.ones(()).double(), angles.double()
        ).unsqueeze(1)
        truth = torch.cat((turned.real, turned.imag), dim=-1)
        assert y.dtype == dtype
        assert (y - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()
        assert torch.equal(y[0], x[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7,), (4, 4, 4), (3, 5, 5, 0, 1, 9)])
def test_varlen_attention(lengths: tuple[int, ...], causal: bool) -> None:
    offsets = (0, *torch.tensor(lengths).cumsum(0).tolist())
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (6, 2, 2))
    y = ops.varlen_attention(q, k, v, offsets, causal, 0.3)
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        part = slice(start, end)
        truth = dense_attention(q[part], k[part], v[part], 0 if causal else None, 0.3)
        torch.testing.assert_close(y[part].double(), truth, rtol=1e-5, atol=1e-5)


def test_varlen_attention_is_differentiable() -> None:
    q, k, v = (torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda *x: ops.varlen_attention(*x, (0, 2, 6), True, 0.5), (q, k, v)
    )


class Cache:
    """A paged cache whose unused slots are NaN, with requests at scattered blocks."""

    def __init__(self, lengths: tuple[int, ...], heads: int, dim: int, block_size: int) -> None:
        self.k = [torch.randn(n, heads, dim) for n in lengths]
        self.v = [torch.randn(n, heads, dim) for n in lengths]
        most = max(-(-n // block_size) for n in lengths)
        blocks = torch.randperm(len(lengths) * most + 3)[: len(lengths) * most]
        self.table = blocks.view(len(lengths), most).int()
        shape = (len(lengths) * most + 3, block_size, heads, dim)
        self.keys, self.values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        for i, n in enumerate(lengths):
            places = torch.arange(n)
            slots = self.table[i, places // block_size].long() * block_size + places % block_size
            ops.write_kv(self.k[i], self.v[i], self.keys, self.values, slots)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("contexts", "new"),
    [
        ((9,), (9,)),
        ((13, 13, 13), (1, 1, 1)),
        ((5, 17, 17, 8, 1), (1, 1, 1, 4, 1)),
        ((16, 20, 20), (16, 7, 7)),
        ((30, 6, 12), (0, 6, 1)),
    ],
)
def test_paged_attention(
    contexts: tuple[int, ...], new: tuple[int, ...], dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    """Prefill, chunks and decode agree with dense attention; slots past the context are unused."""
    cache = Cache(contexts, heads[1], 16, block_size=4)
    q = torch.randn(sum(new), heads[0], 16).to(dtype)
    offsets = (0, *torch.tensor(new).cumsum(0).tolist())
    y = ops.paged_attention(q, cache.keys, cache.values, cache.table, offsets, contexts, 0.25)
    assert y.dtype == dtype
    if dtype == cache.keys.dtype:
        lengths = [torch.tensor(x, dtype=torch.int32) for x in (offsets, contexts)]
        caches = (cache.keys, cache.values, cache.table)
        assert torch.equal(ops.paged_attention_prefill(q, *caches, *lengths, 0.25), y)
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        first = contexts[i] - new[i]
        truth = dense_attention(q[start:end], cache.k[i], cache.v[i], first, 0.25)
        torch.testing.assert_close(
            y[start:end].double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_chunked_prefill_equals_whole_prefill() -> None:
    cache = Cache((23,), 2, 16, block_size=8)
    q = torch.randn(23, 4, 16)

    def attend(start: int, end: int) -> torch.Tensor:
        part, span = q[start:end], (0, end - start)
        return ops.paged_attention(part, cache.keys, cache.values, cache.table, span, (end,), 0.25)

    whole = attend(0, 23)
    chunks = torch.cat([attend(0, 7), attend(7, 16), attend(16, 22), attend(22, 23)])
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    q, k = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    table, cache = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(3, 4, 2, 8)
    with pytest.raises(ValueError, match=r"weight must be \[8\], got \[7\]"):
        ops.rms_norm(q, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="residual must be"):
        ops.add_rms_norm(q, k, torch.ones(8), 1e-6)
    with pytest.raises(TypeError, match=r"residual must be torch.float32 as x is, got .*bfloat16"):
        ops.add_rms_norm(q, q.bfloat16(), torch.ones(8), 1e-6)
    with pytest.raises(TypeError, match=r"x must be one of .* got torch.int64"):
        ops.rms_norm(q.long(), torch.ones(8), 1e-6)
    with pytest.raises(TypeError, match=r"gate_up must be one of .* got torch.int32"):
        ops.swiglu(torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cos must be one of .* got torch.int64"):
        ops.rope(q, k, torch.zeros(4, 8).long(), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="odd width"):
        ops.swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="cos and sin"):
        ops.rope(q, k, torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"k must be \[4, Hk, 8\]"):
        ops.rope(q, k[:3], torch.zeros(4, 8), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="does not go with k"):
        ops.varlen_attention(q, torch.zeros(4, 3, 8), torch.zeros(4, 3, 8), (0, 4), True, 1.0)
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 4"):
        ops.varlen_attention(q, k, k, (0, 3), True, 1.0)
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        ops.varlen_attention(q, k, k, (0, 3, 2, 4), True, 1.0)
    with pytest.raises(TypeError, match="slot_mapping must be int64"):
        ops.write_kv(k, k, cache, cache, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="caches must be"):
        ops.write_kv(k, k, cache, cache[:2], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="block_table must be int32"):
        ops.paged_attention(q, cache, cache, table.long(), (0, 4), (4,), 1.0)
    with pytest.raises(ValueError, match="request 0: context_len 3 must hold its 4 new"):
        ops.paged_attention(q, cache, cache, table, (0, 4), (3,), 1.0)
    with pytest.raises(ValueError, match="fit the 8 slots"):
        ops.paged_attention(q, cache, cache, table, (0, 4), (9,), 1.0)
    with pytest.raises(ValueError, match="names 2 requests"):
        ops.paged_attention(q, cache, cache, table, (0, 2, 4), (4, 4), 1.0)
    with pytest.raises(TypeError, match=r"value_cache is torch.bfloat16, key_cache torch.float32"):
        ops.paged_attention(q, cache, cache.bfloat16(), table, (0, 4), (4,), 1.0)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be a finite number above 0"):
            ops.paged_attention(q, cache, cache, table, (0, 4), (4,), scale)


@pytest.mark.parametrize("quantized", [False, True])
def test_paged_attention_decode(quantized: bool) -> None:
    """int8 caches are multiplied by their scales; lengths come as a tensor."""
    lengths = (13, 1, 8)
    cache = Cache(lengths, 2, 16, block_size=4)
    q, scales = torch.randn(3, 6, 16), torch.rand(cache.keys.shape[:3]).half() + 0.5
    keys, values, k, v = cache.keys, cache.values, cache.k, cache.v
    if quantized:
        keys, values = (
            x.nan_to_num().mul(20).clamp(-127, 127).to(torch.int8) for x in (keys, values)
        )
        dense = [x.double() * scales.double()[..., None] for x in (keys, values)]
        k, v = (
            [x[cache.table[i].long()].flatten(0, 1)[:n] for i, n in enumerate(lengths)]
            for x in dense
        )
    given = (scales, scales) if quantized else (None, None)
    context = torch.tensor(lengths, dtype=torch.int32)
    y = ops.paged_attention_decode(q, keys, values, cache.table, context, 0.25, *given)
    host = ops.paged_attention(q, keys, values, cache.table, tuple(range(4)), lengths, 0.25, *given)
    assert torch.equal(host, y)
    for i, n in enumerate(lengths):
        truth = dense_attention(q[i : i + 1], k[i], v[i], n - 1, 0.25)
        torch.testing.assert_close(y[i : i + 1].double(), truth, rtol=1e-4, atol=1e-4)


def test_wrong_decode_arguments_are_named() -> None:
    q, cache = torch.zeros(2, 4, 8), torch.zeros(3, 4, 2, 8)
    table, lengths = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    scales = torch.ones(3, 4, 2).half()
    decode = ops.paged_attention_decode
    with pytest.raises(TypeError, match="context_lens must be int32, got torch.int64"):
        decode(q, cache, cache, table, lengths.long(), 1.0)
    with pytest.raises(
        ValueError, match=r"block_table must be contiguous \[2, 2\] for 2 requests, got \[1, 2\]"
    ):
        decode(q, cache, cache, table[:1], lengths, 1.0)
    with pytest.raises(TypeError, match="key_cache must be torch.int8, as key_scales is given"):
        decode(q, cache, cache, table, lengths, 1.0, scales, scales)
    with pytest.raises(ValueError, match="key_cache must be contiguous"):
        decode(q, cache.transpose(1, 2), cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match=r"q \[2, 3, 8\] does not go with a cache"):
        decode(q[:, :3], cache, cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match=r"value_scales must be contiguous \[3, 4, 2\] float16"):
        decode(q, cache.char(), cache.char(), table, lengths, 1.0, scales, scales[:2])
    with pytest.raises(ValueError, match="both be given"):
        decode(q, cache.char(), cache, table, lengths, 1.0, scales)


def test_wrong_prefill_arguments_are_named() -> None:
    q, cache = torch.zeros(5, 4, 8), torch.zeros(3, 4, 2, 8)
    table, lengths = torch.zeros(2, 2, dtype=torch.int32), torch.full((2,), 4, dtype=torch.int32)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    scales, codes = torch.ones(3, 4, 2).half(), cache.char()
    prefill = ops.paged_attention_prefill
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32, got torch.int64"):
        prefill(q, cache, cache, table, offsets.long(), lengths, 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be contiguous \[3\] for 2 requests"):
        prefill(q, cache, cache, table, offsets[:2], lengths, 1.0)
    with pytest.raises(ValueError, match=r"block_table must .* got \[2, 2\] with strides \[1, 2\]"):
        prefill(q, cache, cache, table.t(), offsets, lengths, 1.0)
    with pytest.raises(ValueError, match="context_lens is on meta, q is on cpu"):
        prefill(q, cache, cache, table, offsets, lengths.to("meta"), 1.0)
    with pytest.raises(ValueError, match="q is on cpu, the caches are on meta"):
        prefill(q, cache.to("meta"), cache.to("meta"), table, offsets, lengths, 1.0)
    with pytest.raises(ValueError, match="key_scales is on meta, its cache on cpu"):
        prefill(q, codes, codes, table, offsets, lengths, 1.0, scales.to("meta"), scales)
    with pytest.raises(TypeError, match="key_cache must be torch.float32, got torch.float16"):
        prefill(q, cache.half(), cache.half(), table, offsets, lengths, 1.0)
