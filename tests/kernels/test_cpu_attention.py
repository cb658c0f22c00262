"""The compiled attention of single tokens: alone as in a batch, on any threads, over odd scales."""

from __future__ import annotations

import time

import pytest
import torch

from mgvq_kernels import cpu, cpu_threads, ops
from mgvq_kernels.cpu_threads import over_threads
from tests.kernels.test_dense_ops import dense_attention

CONTEXTS = (33, 1, 16, 9, 40)
NEW = (1, 1, 1, 4, 1)
OFFSETS = (0, 1, 2, 3, 7, 8)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values and block table of five requests; blocks lie in no order."""
    torch.manual_seed(0)
    table = torch.randperm(25).view(5, 5).int()
    return torch.randn(8, 6, 32), torch.randn(25, 8, 2, 32), torch.randn(25, 8, 2, 32), table


def test_a_request_is_the_same_alone(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, keys, values, table = batch
    together = ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2)
    for i, (begin, new) in enumerate(zip(OFFSETS, NEW, strict=False)):
        mine = slice(begin, begin + new)
        alone = ops.paged_attention(
            q[mine], keys, values, table[i : i + 1], (0, new), CONTEXTS[i : i + 1], 0.2
        )
        assert torch.equal(together[mine], alone)
    monkeypatch.setattr(cpu, "THREAD_PRODUCTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(
        ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2), together
    )


def test_poison_stays_in_its_request(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    q, keys, values, table = batch
    clean = ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2)
    keys[table[0, 1].long(), 3] = torch.nan
    y = ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], clean[1:])


@pytest.mark.parametrize("block", [-1, 25])
@pytest.mark.parametrize("request_", [1, 3])
def test_a_block_that_is_not_there_is_named(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], request_: int, block: int
) -> None:
    """Of a chunk and of a single token; behind a context anything may stand."""
    q, keys, values, table = batch
    used = -(-CONTEXTS[request_] // 8)
    table[request_, used:] = block
    ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2)
    table[request_, used - 1] = block
    with pytest.raises(ValueError, match=rf"outside \[0, 25\) for request {request_}: .*{block}"):
        ops.paged_attention(q, keys, values, table, OFFSETS, CONTEXTS, 0.2)


def test_no_thread_outlives_an_error_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they write to is freed when the call that owns it ends."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done = []

    def run(first: int, last: int) -> None:
        if first == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        done.append(first)

    with pytest.raises(KeyboardInterrupt):
        over_threads(run, 0, 12, 1, is_much=True)
    assert sorted(done) == [4, 8]


def test_no_thread_outlives_an_interrupt_of_the_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    waits, done = [KeyboardInterrupt, KeyboardInterrupt], []
    real = cpu_threads.wait

    def interrupted(futures: object) -> object:
        if waits:
            raise waits.pop()
        return real(futures)

    def run(first: int, last: int) -> None:
        time.sleep(0.2 * first)
        done.append(first)

    monkeypatch.setattr(cpu_threads, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        over_threads(run, 0, 2, 1, is_much=True)
    assert (done, waits) == ([0, 1], [])


@pytest.mark.parametrize("scale", [6e-8, 3e-5, 0.0123, 1.0, 65504.0])
def test_every_half_scale_is_read(scale: float) -> None:
    """Float16 is read bit by bit: subnormal, small, large; one key, so the value comes back."""
    codes = torch.arange(-16, 16, dtype=torch.int8).view(1, 1, 1, 32)
    scales = torch.tensor(scale).half().view(1, 1, 1)
    table, q = torch.zeros(1, 1, dtype=torch.int32), torch.randn(1, 2, 32)
    y = ops.paged_attention(q, codes, codes, table, (0, 1), (1,), 1e-6, scales, scales)
    assert torch.equal(y, (codes.float() * scales.float()).view(1, 1, 32).expand(1, 2, 32))
    for odd in (torch.inf, torch.nan):
        given = torch.full_like(scales, odd)
        assert (
            ops.paged_attention(q, codes, codes, table, (0, 1), (1,), 1.0, scales, given)
            .isnan()
            .all()
        )


def test_large_scores_do_not_overflow() -> None:
    q, k = torch.full((1, 1, 8), 100.0), torch.randn(1, 4, 1, 8)
    k[0, 2] = 9.0
    table = torch.zeros(1, 1, dtype=torch.int32)
    y = ops.paged_attention(q, k, k, table, (0, 1), (4,), 1.0)
    truth = dense_attention(q, k[0], k[0], 3, 1.0)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
