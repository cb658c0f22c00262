"""Cases of the ops without codes: norms, gating, rope, attention, the paged cache.

One generator an op, in `CASES`. On a GPU the front door is called, which chooses the kernel; in
the interpreter `ENTRIES` names the Triton entry point, for the front door takes plain torch on a
CPU. A new kernel is a line there, a new op a generator and a line of `CASES`.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.cases import TOLERANCES, ULPS, Cases, OpCase
from benchmarks.gpu_suite.place import Place
from mgvq_kernels import ops

ENTRIES: Mapping[str, tuple[str, str]] = {
    "paged_attention_decode": ("paged_attention", "paged_attention_decode"),
    "paged_attention_prefill": ("paged_prefill", "paged_attention_prefill"),
}
"""Triton entry points by op: module of `mgvq_kernels.triton` and function."""

BLOCK = 16
"""Tokens of a page."""

INT8_KV_TOLERANCE = 1e-2


def entry(op: str, place: Place) -> Callable[..., Any]:
    """Return what runs an op at a place: its front door, or the kernel that is interpreted."""
    if place.is_gpu or op not in ENTRIES:
        return getattr(ops, op)
    module, function = ENTRIES[op]
    return getattr(importlib.import_module(f"mgvq_kernels.triton.{module}"), function)


def draw(place: Place, dtype: torch.dtype, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw normal numbers: in `dtype` on the device, and the same in float64 on the CPU."""
    generator = torch.Generator(place.device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device=place.device).to(dtype)
    return drawn, drawn.cpu().double()


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise by the root mean square, in float64."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm(place: Place, real: bool) -> Iterator[OpCase]:
    """A ragged width, or a decode batch of Qwen2-VL-7B."""
    tokens, width = (16, 3584) if real else (3, 130)
    run = entry("rms_norm", place)
    for dtype in place.dtypes:
        (x, x64), (w, w64) = draw(place, dtype, tokens, width), draw(place, dtype, width, seed=1)
        yield OpCase(
            f"{dtype} {tokens}x{width}",
            lambda x=x, w=w: run(x, w, 1e-6),
            lambda x=x64, w=w64: normed(x, w),
            ULPS,
            "ulps",
            nbytes=2 * x.nbytes if real else 0,
        )


def add_rms_norm(place: Place, real: bool) -> Iterator[OpCase]:
    """The same with a residual; the sum is rounded to the dtype before it is normalised."""
    tokens, width = (16, 3584) if real else (3, 130)
    run = entry("add_rms_norm", place)
    for dtype in place.dtypes:
        (x, x64), (r, r64) = (draw(place, dtype, tokens, width, seed=s) for s in (0, 1))
        w, w64 = draw(place, dtype, width, seed=2)
        total = (x64 + r64).to(dtype).double()
        yield OpCase(
            f"{dtype} {tokens}x{width}",
            lambda x=x, r=r, w=w: run(x, r, w, 1e-6),
            lambda total=total, w=w64: (normed(total, w), total),
            ULPS,
            "ulps",
            nbytes=4 * x.nbytes if real else 0,
        )


def swiglu(place: Place, real: bool) -> Iterator[OpCase]:
    """A ragged width, or the gate and up of Qwen2-VL-7B."""
    tokens, width = (16, 18944) if real else (3, 70)
    run = entry("swiglu", place)
    for dtype in place.dtypes:
        x, x64 = draw(place, dtype, tokens, 2 * width)
        gate, up = x64.chunk(2, dim=-1)
        yield OpCase(
            f"{dtype} {tokens}x{width}",
            lambda x=x: run(x),
            lambda gate=gate, up=up: gate * torch.sigmoid(gate) * up,
            ULPS,
            "ulps",
            nbytes=3 * x.nbytes // 2 if real else 0,
        )


def rope(place: Place, real: bool) -> Iterator[OpCase]:
    """Queries and keys at scattered positions."""
    tokens, heads, kv_heads, dim = (16, 28, 4, 128) if real else (3, 4, 2, 16)
    run = entry("rope", place)
    for dtype in place.dtypes:
        q, q64 = draw(place, dtype, tokens, heads, dim)
        k, k64 = draw(place, dtype, tokens, kv_heads, dim, seed=1)
        angles = torch.arange(tokens)[:, None] * 37 / 10000 ** (torch.arange(dim // 2) * 2 / dim)
        cos, sin = (f(torch.cat((angles, angles), -1)).float() for f in (torch.cos, torch.sin))
        here = cos.to(place.device), sin.to(place.device)
        wide = cos.double(), sin.double()
        yield OpCase(
            f"{dtype} {tokens}x{heads}+{kv_heads}x{dim}",
            lambda q=q, k=k, here=here: run(q, k, *here),
            lambda q=q64, k=k64, wide=wide: (turned(q, *wide), turned(k, *wide)),
            ULPS,
            "ulps",
            nbytes=2 * (q.nbytes + k.nbytes) if real else 0,
        )


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + Dh/2) of `x [T, H, Dh]` by `cos, sin [T, Dh]`."""
    first, second = x.chunk(2, dim=-1)
    c, s = (part.chunk(2, dim=-1)[0].unsqueeze(1) for part in (cos, sin))
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Attend `q [T, H, Dh]`, the last of the tokens of `k, v [S, Hk, Dh]`, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if causal:
        places = torch.arange(k.shape[0] - q.shape[0], k.shape[0])
        later = torch.arange(k.shape[0])[None, :] > places[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


def varlen_attention(place: Place, real: bool) -> Iterator[OpCase]:
    """Two sequences of one length and one of another; or an image's patches (heads of 80)."""
    offsets, heads, dim = ((0, 1024), 16, 80) if real else ((0, 5, 10, 13), 4, 16)
    run = entry("varlen_attention", place)
    for dtype in place.dtypes:
        parts = [draw(place, dtype, offsets[-1], heads, dim, seed=s) for s in range(3)]
        q, k, v = (part[0] for part in parts)
        wide = [part[1] for part in parts]
        yield OpCase(
            f"{dtype} {offsets} {heads}x{dim}",
            lambda q=q, k=k, v=v: run(q, k, v, offsets, not real, 0.25),
            lambda wide=wide: torch.cat(
                [
                    attended(*(x[a:b] for x in wide), 0.25, causal=not real)
                    for a, b in itertools.pairwise(offsets)
                ]
            ),
            TOLERANCES["attention"][dtype],
            nbytes=4 * q.nbytes if real else 0,
        )


def write_kv(place: Place, real: bool) -> Iterator[OpCase]:
    """Scattered slots of a cache of sevens; the rest must stay seven."""
    tokens, heads, dim = (512, 4, 128) if real else (5, 2, 16)
    blocks = -(-tokens // BLOCK) + 2
    slots = torch.randperm(blocks * BLOCK, generator=torch.Generator().manual_seed(0))[:tokens]
    run = entry("write_kv", place)
    for dtype in place.dtypes:
        (k, k64), (v, v64) = (draw(place, dtype, tokens, heads, dim, seed=s) for s in (0, 1))
        caches = [torch.full((blocks, BLOCK, heads, dim), 7.0).to(k) for _ in range(2)]

        def written(k: Tensor, v: Tensor, caches: list[Tensor], slots: Tensor) -> Any:
            run(k, v, *caches, slots)
            return tuple(caches)

        def truth(wide: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
            outputs = []
            for values in wide:
                flat = torch.full((blocks * BLOCK, heads, dim), 7.0, dtype=dtype)
                for token, slot in enumerate(slots.tolist()):
                    flat[slot] = values[token].to(dtype)
                outputs.append(flat.view(blocks, BLOCK, heads, dim))
            return tuple(outputs)

        here = slots.to(place.device)
        yield OpCase(
            f"{dtype} {tokens}x{heads}x{dim}",
            lambda k=k, v=v, caches=caches, here=here: written(k, v, caches, here),
            lambda wide=(k64, v64), dtype=dtype: truth(wide, dtype),
            0.0,
            "bits",
            nbytes=4 * k.nbytes if real else 0,
        )
        yield int8_write(k, v, here, blocks)


def int8_write(k: Tensor, v: Tensor, slots: Tensor, blocks: int) -> OpCase:
    """Describe a write into int8 caches: multiplied out, it is what came in within rounding."""
    shape = (blocks, BLOCK, *k.shape[1:])
    caches = [torch.zeros(shape, dtype=torch.int8, device=k.device) for _ in range(2)]
    scales = [torch.zeros(shape[:3], dtype=torch.float16, device=k.device) for _ in range(2)]

    def written() -> Tensor:
        ops.write_kv(k, v, *caches, slots, *scales)
        pairs = zip(caches, scales, strict=True)
        return torch.stack([(c.float() * s[..., None]).flatten(0, 1)[slots] for c, s in pairs])

    return OpCase(
        f"{k.dtype} int8 cache {list(k.shape)}",
        written,
        lambda: torch.stack([k, v]).cpu().double(),
        INT8_KV_TOLERANCE,
    )


def rope_write_kv(place: Place, real: bool) -> Iterator[OpCase]:
    """A token a slot, in order, of caches that hold nothing else."""
    tokens, heads, kv_heads, dim = (16, 28, 4, 128) if real else (16, 4, 2, 16)
    run = entry("rope_write_kv", place)
    angles = torch.rand(tokens, dim // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    here = [f(angles).to(place.device) for f in (torch.cos, torch.sin)]
    wide = [f(angles).double() for f in (torch.cos, torch.sin)]
    slots = torch.arange(tokens, device=place.device)
    for dtype in place.dtypes:
        q, q64 = draw(place, dtype, tokens, heads, dim)
        (k, k64), (v, v64) = (draw(place, dtype, tokens, kv_heads, dim, seed=s) for s in (1, 2))
        caches = [torch.zeros_like(k).unsqueeze(0) for _ in range(2)]
        yield OpCase(
            f"{dtype} {tokens}x{heads}+{kv_heads}x{dim}",
            lambda q=q, k=k, v=v, c=caches: (run(q, k, v, *here, *c, slots), *c),
            lambda q=q64, k=k64, v=v64: (turned(q, *wide), turned(k, *wide)[None], v[None]),
            ULPS,
            "ulps",
            nbytes=2 * (q.nbytes + k.nbytes + v.nbytes) if real else 0,
        )


class Paged:
    """Requests at scattered pages; slots past a request's end hold NaN (127 where int8)."""

    def __init__(
        self,
        place: Place,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        kv_heads: int,
        dim: int,
        is_int8: bool = False,
    ) -> None:
        generator = torch.Generator(place.device).manual_seed(0)
        device = place.device
        most = max(-(-n // BLOCK) for n in lengths)
        count = len(lengths) * most + 2
        order = torch.randperm(count, generator=generator, device=device)
        self.table = order[:-2].view(len(lengths), most).int()
        self.lengths = lengths
        used = torch.zeros(count, BLOCK, dtype=torch.bool, device=device)
        places = torch.arange(most * BLOCK, device=device).view(most, BLOCK)
        for blocks, n in zip(self.table.long(), lengths, strict=True):
            used[blocks] = places < n
        shape = (count, BLOCK, kv_heads, dim)
        self.caches, self.scales = [], []
        for _ in range(2):
            values = torch.randn(shape, generator=generator, device=device).to(dtype)
            if is_int8:
                values = values.mul(40).clamp(-127, 127).to(torch.int8)
                scales = torch.rand(shape[:3], generator=generator, device=device).half() / 50
                scales[~used] = float("nan")
            values[~used] = 127 if is_int8 else float("nan")
            self.caches.append(values)
            self.scales.append(scales if is_int8 else None)

    def truth(self, q: Tensor, q_lens: tuple[int, ...], scale: float) -> Tensor:
        """Attend each request's queries `q [T, H, Dh]` float64 to its own tokens."""
        keys, values = (self.rows(i) for i in range(2))
        parts = zip(q.split(q_lens), keys, values, strict=True)
        return torch.cat([attended(part, k, v, scale) for part, k, v in parts])

    def rows(self, which: int) -> list[Tensor]:
        """Gather the keys (0) or values (1) of every request in float64: `[S, Hk, Dh]` each."""
        wide, scales = self.caches[which].cpu().double(), self.scales[which]
        if scales is not None:
            wide = wide * scales.cpu().double()[..., None]
        pairs = zip(self.table.cpu().long(), self.lengths, strict=True)
        return [wide[blocks].flatten(0, 1)[:n] for blocks, n in pairs]


def paged_attention(place: Place, real: bool) -> Iterator[OpCase]:
    """Prefill chunks and a decode in one batch; or a chunk of 512 in a context of 2048."""
    q_lens, lengths, heads = ((512,), (2048,), (28, 4)) if real else ((3, 1, 7), (20, 9, 7), (4, 2))
    dim, run = 128 if real else 16, entry("paged_attention", place)
    offsets = tuple(itertools.accumulate((0, *q_lens)))
    for dtype in place.dtypes:
        batch = Paged(place, dtype, lengths, heads[1], dim)
        q, q64 = draw(place, dtype, sum(q_lens), heads[0], dim, seed=9)
        yield OpCase(
            f"{dtype} {q_lens} of {lengths} {heads[0]}/{heads[1]}x{dim}",
            lambda q=q, b=batch: run(q, *b.caches, b.table, offsets, b.lengths, 0.09),
            lambda q=q64, b=batch: b.truth(q, q_lens, 0.09),
            TOLERANCES["attention"][dtype],
            nbytes=2 * q.nbytes + 2 * lengths[0] * heads[1] * dim * 2 if real else 0,
        )


def paged_attention_prefill(place: Place, real: bool) -> Iterator[OpCase]:
    """The batches of `paged_attention`, offsets and lengths on the device; int8 caches too."""
    q_lens, lengths, heads = ((512,), (2048,), (28, 4)) if real else ((3, 1, 7), (20, 9, 7), (4, 2))
    dim, run = 128 if real else 16, entry("paged_attention_prefill", place)
    offsets = torch.tensor((0, *itertools.accumulate(q_lens)), dtype=torch.int32)
    places = offsets.to(place.device), torch.tensor(lengths, dtype=torch.int32, device=place.device)
    for dtype, is_int8 in itertools.product(place.dtypes, (False, True)):
        batch = Paged(place, dtype, lengths, heads[1], dim, is_int8)
        q, q64 = draw(place, dtype, sum(q_lens), heads[0], dim, seed=9)
        yield OpCase(
            f"{dtype}{' int8 cache' if is_int8 else ''} {q_lens} of {lengths} "
            f"{heads[0]}/{heads[1]}x{dim}",
            lambda q=q, b=batch: run(q, *b.caches, b.table, *places, 0.09, *b.scales),
            lambda q=q64, b=batch: b.truth(q, q_lens, 0.09),
            INT8_KV_TOLERANCE if is_int8 else TOLERANCES["attention"][dtype],
            nbytes=2 * q.nbytes + 2 * sum(lengths) * heads[1] * (dim + 2 if is_int8 else 2 * dim)
            if real
            else 0,
        )


def paged_attention_decode(place: Place, real: bool) -> Iterator[OpCase]:
    """One token a request over one and two splits; or 8 requests of 2048; int8 caches too."""
    lengths, heads = ((2048,) * 8, (28, 4)) if real else ((300, 5), (4, 2))
    dim, run = 128 if real else 16, entry("paged_attention_decode", place)
    context = torch.tensor(lengths, dtype=torch.int32, device=place.device)
    for dtype, is_int8 in itertools.product(place.dtypes, (False, True)):
        batch = Paged(place, dtype, lengths, heads[1], dim, is_int8)
        q, q64 = draw(place, dtype, len(lengths), heads[0], dim, seed=9)
        cache_bytes = 2 * sum(lengths) * heads[1] * (dim + 2 if is_int8 else 2 * dim)
        yield OpCase(
            f"{dtype}{' int8 cache' if is_int8 else ''} {len(lengths)} of {lengths[0]} "
            f"{heads[0]}/{heads[1]}x{dim}",
            lambda q=q, b=batch: run(q, *b.caches, b.table, context, 0.09, *b.scales),
            lambda q=q64, b=batch: b.truth(q, (1,) * len(b.lengths), 0.09),
            INT8_KV_TOLERANCE if is_int8 else TOLERANCES["attention"][dtype],
            nbytes=2 * q.nbytes + cache_bytes if real else 0,
        )


CASES: Mapping[str, Cases] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": swiglu,
    "rope": rope,
    "varlen_attention": varlen_attention,
    "write_kv": write_kv,
    "rope_write_kv": rope_write_kv,
    "paged_attention": paged_attention,
    "paged_attention_prefill": paged_attention_prefill,
    "paged_attention_decode": paged_attention_decode,
}
"""By op of `mgvq_kernels.ops.OPS`."""
