"""Decode attention in Triton's interpreter, against softmax written out in float64.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from mgvq_kernels.triton import paged_attention
from mgvq_kernels.triton.paged_attention import paged_attention_decode


class Batch:
    """Requests at scattered blocks of a cache whose unused slots are NaN (127 where int8)."""

    def __init__(
        self, lengths: tuple[int, ...], heads: tuple[int, int], dim: int, quantized: bool = False
    ) -> None:
        torch.manual_seed(0)
        most = max(-(-n // 16) for n in lengths)
        self.table = torch.randperm(len(lengths) * most + 2)[:-2].view(len(lengths), most).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = torch.randn(len(lengths), heads[0], dim).half()
        shape = (len(lengths) * most + 2, 16, heads[1], dim)
        self.caches, self.scales, self.rows = [], [], []
        for _ in range(2):
            values, scales = torch.randn(shape).half(), torch.rand(shape[:3]).half() / 50
            if quantized:
                values = torch.randint(-127, 128, shape, dtype=torch.int8)
            wide = values.double() * (scales.double()[..., None] if quantized else 1.0)
            rows = [
                torch.cat([wide[b] for b in blocks])[:n]  # [S, Hk, Dh]
                for blocks, n in zip(self.table.tolist(), lengths, strict=True)
            ]
            used = torch.zeros(shape[:2], dtype=torch.bool)
            for blocks, n in zip(self.table.tolist(), lengths, strict=True):
                for token in range(n):
                    used[blocks[token // 16], token % 16] = True
            values[~used] = 127 if quantized else math.nan
            self.caches.append(values)
            self.scales.append(
                scales.masked_fill(~used[..., None], math.nan) if quantized else None
            )
            self.rows.append(rows)

    def run(self, *picked: int) -> torch.Tensor:
        rows = list(picked) or list(range(len(self.lengths)))
        return paged_attention_decode(
            self.q[rows], *self.caches, self.table[rows], self.lengths[rows], 0.25, *self.scales
        )

    def truth(self) -> torch.Tensor:
        outputs = []
        for q, k, v in zip(self.q.double(), *self.rows, strict=True):
            k, v = (x.repeat_interleave(q.shape[0] // x.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("hd,shd->hs", q, k) * 0.25
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v))
        return torch.stack(outputs)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"), [((1, 40, 17), (4, 4), 16), ((300, 256), (14, 2), 24)]
)
def test_decode(
    lengths: tuple[int, ...], heads: tuple[int, int], dim: int, quantized: bool
) -> None:
    """Grouped heads, a ragged head dimension, one and two splits; slots past the end unread."""
    batch = Batch(lengths, heads, dim, quantized)
    y, truth = batch.run(), batch.truth()
    assert float((y - truth).norm() / truth.norm()) < 2e-3


def test_a_request_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch((300, 5), (4, 2), 16)
    whole = batch.run()
    assert torch.equal(batch.run(0)[0], whole[0])
    assert torch.equal(batch.run(1)[0], whole[1])
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return empty(*shape, **options).fill_(math.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(paged_attention.torch, "empty", poisoned)
    assert torch.equal(batch.run(), whole)


def test_the_custom_op_is_well_formed() -> None:
    batch = Batch((20, 3), (4, 2), 16)
    arguments = (batch.q, *batch.caches, batch.table, batch.lengths, 0.25, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(paged_attention_decode, arguments, test_utils=checks)
