"""Decode attention in Triton's interpreter, against softmax written out in float64.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


@st.composite
def batches(draw: st.DrawFn) -> PagedBatch:
    """One or two requests around the edges of pages, tiles and a split."""
    edges = (1, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257)
    lengths = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=2))
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.sampled_from((1, 7, 17)))
    dim, block_size = draw(st.sampled_from((16, 64, 80, 96))), draw(st.sampled_from((16, 32)))
    return PagedBatch(
        tuple(lengths), (heads, kv_heads), dim, draw(st.booleans()), block_size=block_size
    )


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(batches())
def test_decode_at_the_edges(batch: PagedBatch) -> None:
    """Pages of either size, more heads than a tile has rows, head dimensions that are padded."""
    y, truth = decode(batch), batch.truth(0.25)
    assert float((y - truth).norm() / truth.norm()) < 2e-3
    assert torch.equal(decode(batch), y)


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
