"""Which kernel attention takes on a GPU that is not there, and what it gives where one is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mgvq_kernels import ops
from tests.kernels.paged_batch import PagedBatch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

OPTIONS = {"dtype": torch.float16, "device": "cuda:0"}


class OurOps(TorchDispatchMode):
    """Names the custom ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "mgvq":
            self.names.append(func.name().removeprefix("mgvq::triton_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("offsets", "name"),
    [((0, 1, 2), ["paged_attention_decode"]), ((0, 1, 3), ["paged_attention_prefill"])],
)
def test_half_precision_takes_the_kernels(offsets: tuple[int, ...], name: list[str]) -> None:
    with FakeTensorMode(), OurOps() as called:
        q = torch.empty(offsets[-1], 4, 64, **OPTIONS)
        cache = torch.empty(9, 16, 2, 64, **OPTIONS)
        table = torch.empty(2, 3, dtype=torch.int32, device="cuda:0")
        y = ops.paged_attention(q, cache, cache, table, offsets, (4, 9), 1.0)
        assert y.shape == q.shape
        scales = torch.empty(9, 16, 2, **OPTIONS)
        ops.paged_attention(
            q, cache.char(), cache.char(), table, offsets, (4, 9), 1.0, scales, scales
        )
    assert called.names == name * 2


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [((28, 4), 128), ((12, 12), 80), ((14, 2), 64)])
def test_kernels_agree_with_float64(
    heads: tuple[int, int], dim: int, dtype: torch.dtype, quantized: bool
) -> None:
    """A mixed batch through both kernels; the same bits alone, in company and cut in two."""
    lengths, new = (700, 1, 33, 300), (300, 1, 33, 1)
    batch = PagedBatch(lengths, heads, dim, quantized, new)
    batch.q = batch.q.to(dtype).half()
    q, table = batch.q.to(dtype).cuda(), batch.table.cuda()
    caches = [x.cuda() if quantized else x.to(dtype).cuda() for x in batch.caches]
    scales = [None if x is None else x.cuda() for x in batch.scales]
    offsets, scale = tuple(batch.offsets.tolist()), dim**-0.5

    def attend(
        rows: slice, spans: tuple[int, ...], contexts: tuple[int, ...], i: slice
    ) -> torch.Tensor:
        return ops.paged_attention(q[rows], *caches, table[i], spans, contexts, scale, *scales)

    y = attend(slice(None), offsets, lengths, slice(None))
    truth = batch.truth(scale)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-2
    assert float((y.cpu() - truth).norm() / truth.norm()) < tolerance
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        alone = attend(slice(start, end), (0, end - start), lengths[i : i + 1], slice(i, i + 1))
        if end - start > 1:
            assert torch.equal(alone, y[start:end])
        else:
            torch.testing.assert_close(alone, y[start:end], rtol=tolerance, atol=tolerance)
    parts = [attend(slice(0, 77), (0, 77), (477,), slice(0, 1))]
    parts.append(attend(slice(77, 300), (0, 223), (700,), slice(0, 1)))
    assert torch.equal(torch.cat(parts), y[:300])
