"""Requests in a paged cache, and attention over them written out in float64."""

from __future__ import annotations

import itertools
import math

import torch


class PagedBatch:
    """Requests at scattered blocks of a cache whose unused slots are NaN (127 where int8)."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        heads: tuple[int, int],
        dim: int,
        quantized: bool = False,
        new: tuple[int, ...] = (),
        block_size: int = 16,
    ) -> None:
        """Draw requests of `lengths` cached tokens, the last `new` (one each) of them queries."""
        torch.manual_seed(0)
        new = new or (1,) * len(lengths)
        most = max(-(-n // block_size) for n in lengths)
        blocks = len(lengths) * most + 2
        self.table = torch.randperm(blocks)[:-2].view(len(lengths), most).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.offsets = torch.tensor((0, *itertools.accumulate(new)), dtype=torch.int32)
        self.q = torch.randn(sum(new), heads[0], dim).half()
        shape = (blocks, block_size, heads[1], dim)
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
            for pages, n in zip(self.table.tolist(), lengths, strict=True):
                for token in range(n):
                    used[pages[token // block_size], token % block_size] = True
            values[~used] = 127 if quantized else math.nan
            self.caches.append(values)
            self.scales.append(
                scales.masked_fill(~used[..., None], math.nan) if quantized else None
            )
            self.rows.append(rows)

    def truth(self, scale: float) -> torch.Tensor:
        """Softmax written out: `[T, H, Dh]` float64."""
        outputs = []
        spans = itertools.pairwise(self.offsets.tolist())
        for (start, end), k, v in zip(spans, *self.rows, strict=True):
            q = self.q[start:end].double()
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("qhd,shd->hqs", q, k) * scale
            seen = torch.ones(scores.shape[1:]).tril(k.shape[0] - q.shape[0]).bool()
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            outputs.append(torch.einsum("hqs,shd->qhd", weights, v))
        return torch.cat(outputs)
