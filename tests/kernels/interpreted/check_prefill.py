"""Attention of prompts in Triton's interpreter, against softmax written out in float64.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels.triton import paged_prefill
from mgvq_kernels.triton.paged_attention import paged_attention_decode
from mgvq_kernels.triton.paged_prefill import paged_attention_prefill
from tests.kernels.paged_batch import PagedBatch


def prefill(batch: PagedBatch, *picked: int) -> torch.Tensor:
    """Attend the requests that were picked, by default all."""
    rows = list(picked) or list(range(len(batch.lengths)))
    starts, ends = batch.offsets[:-1][rows], batch.offsets[1:][rows]
    q = torch.cat([batch.q[start:end] for start, end in zip(starts, ends, strict=True)])
    offsets = torch.cat((torch.zeros(1), (ends - starts).cumsum(0))).int()
    return paged_attention_prefill(
        q, *batch.caches, batch.table[rows], offsets, batch.lengths[rows], 0.25, *batch.scales
    )


@st.composite
def batches(draw: st.DrawFn) -> PagedBatch:
    """Up to three requests, whole prompts and chunks from the middle, some with nothing new."""
    new = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any))
    lengths = [draw(st.integers(max(count, 1), 70)) for count in new]
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.sampled_from((1, 3, 7)))
    return PagedBatch(
        tuple(lengths),
        (heads, kv_heads),
        draw(st.sampled_from((16, 80, 96))),
        draw(st.booleans()),
        tuple(new),
        draw(st.sampled_from((16, 32))),
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(batches())
def test_prefill(batch: PagedBatch) -> None:
    """Any lengths, grouped heads, ragged head dimensions, int8; slots past the end unread."""
    y, truth = prefill(batch), batch.truth(0.25)
    assert float((y - truth).norm() / truth.norm()) < 2e-3


def test_many_heads_share_a_key() -> None:
    """More query heads a key/value head than rows of a tile."""
    batch = PagedBatch((5,), (65, 1), 16, new=(3,))
    y, truth = prefill(batch), batch.truth(0.25)
    assert float((y - truth).norm() / truth.norm()) < 2e-3


def test_a_request_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits alone and in company; every number of the output is written."""
    batch = PagedBatch((50, 9, 33), (4, 2), 16, new=(23, 1, 33))
    whole = prefill(batch)
    for i, part in enumerate(whole.split([23, 1, 33])):
        assert torch.equal(prefill(batch, i), part)
    empty = torch.empty_like
    monkeypatch.setattr(
        paged_prefill.torch, "empty_like", lambda *args: empty(*args).fill_(math.nan)
    )
    assert torch.equal(prefill(batch), whole)


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Multiply matrices, every row summed in one order, as tensor cores do and BLAS does not."""
    return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(1)


def test_a_prompt_may_be_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from one chunk, from chunks of uneven lengths and from single tokens."""
    monkeypatch.setattr(np, "matmul", product_in_order)
    batch = PagedBatch((70,), (7, 1), 16, new=(70,))
    whole = prefill(batch)
    cuts = (0, 1, 2, 30, 39, 64, 70)
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        offsets = torch.tensor([0, end - start], dtype=torch.int32)
        length = torch.tensor([end], dtype=torch.int32)
        part = paged_attention_prefill(
            batch.q[start:end], *batch.caches, batch.table, offsets, length, 0.25, None, None
        )
        assert torch.equal(part, whole[start:end]), (start, end)


def test_the_custom_op_is_well_formed() -> None:
    batch = PagedBatch((20, 3), (4, 2), 16, new=(2, 3))
    lengths = (batch.table, batch.offsets, batch.lengths)
    arguments = (batch.q, *batch.caches, *lengths, 0.25, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(paged_attention_prefill, arguments, test_utils=checks)


@pytest.mark.parametrize("is_decode", [True, False])
def test_pages_past_two_billion_numbers_are_found(is_decode: bool) -> None:
    """A cache of which the system gives memory to the pages that are touched alone."""
    first = 2**31 // (16 * 16) - 1
    cache = torch.empty(first + 3, 16, 1, 16, dtype=torch.int8)
    cache[first:] = torch.randint(-127, 128, (3, 16, 1, 16), dtype=torch.int8)
    scales = torch.empty(first + 3, 16, 1, dtype=torch.float16)
    scales[first:] = 0.02
    q, length = torch.randn(1, 2, 16).half(), torch.tensor([40], dtype=torch.int32)

    def attend(pages: torch.Tensor, page_scales: torch.Tensor, first: int) -> torch.Tensor:
        table = torch.arange(first, first + 3, dtype=torch.int32)[None]
        rest = (length, 0.25, page_scales, page_scales)
        if is_decode:
            return paged_attention_decode(q, pages, pages, table, *rest)
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        return paged_attention_prefill(q, pages, pages, table, offsets, *rest)

    near = attend(cache[first:].clone(), scales[first:].clone(), 0)
    assert torch.equal(attend(cache, scales, first), near)
