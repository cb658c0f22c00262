"""Decode attention in Triton's interpreter, against softmax written out in float64.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from mgvq_kernels.triton import paged_attention
from mgvq_kernels.triton.paged_attention import paged_attention_decode
from tests.kernels.paged_batch import PagedBatch


def decode(batch: PagedBatch, *picked: int) -> torch.Tensor:
    """Attend the requests that were picked, by default all."""
    rows = list(picked) or list(range(len(batch.lengths)))
    lengths = batch.lengths[rows]
    return paged_attention_decode(
        batch.q[rows], *batch.caches, batch.table[rows], lengths, 0.25, *batch.scales
    )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"), [((1, 40, 17), (4, 4), 16), ((300, 256), (14, 2), 24)]
)
def test_decode(
    lengths: tuple[int, ...], heads: tuple[int, int], dim: int, quantized: bool
) -> None:
    """Grouped heads, a ragged head dimension, one and two splits; slots past the end unread."""
    batch = PagedBatch(lengths, heads, dim, quantized)
    y, truth = decode(batch), batch.truth(0.25)
    assert float((y - truth).norm() / truth.norm()) < 2e-3


def test_a_request_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = PagedBatch((300, 5), (4, 2), 16)
    whole = decode(batch)
    assert torch.equal(decode(batch, 0)[0], whole[0])
    assert torch.equal(decode(batch, 1)[0], whole[1])
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return empty(*shape, **options).fill_(math.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(paged_attention.torch, "empty", poisoned)
    assert torch.equal(decode(batch), whole)


def test_the_custom_op_is_well_formed() -> None:
    batch = PagedBatch((20, 3), (4, 2), 16)
    arguments = (batch.q, *batch.caches, batch.table, batch.lengths, 0.25, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(paged_attention_decode, arguments, test_utils=checks)
