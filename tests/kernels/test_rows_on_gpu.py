"""Norms, gating, rope and cache writes on a GPU, through the front door, against the reference.

Numbers are drawn on the CPU: a graph that fails to be captured, as one does on purpose in
`test_gpu_suite`, leaves a GPU's own generator refusing to draw for the rest of the process.
"""

from __future__ import annotations

import pytest
import torch

from mgvq_kernels import ops, reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 3584, 16384, 16640])
def test_rows(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 7, width).to("cuda", dtype)
    weight = torch.rand(width).to("cuda", dtype)
    steps = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    y, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    truth, summed = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, summed)
    torch.testing.assert_close(y, truth, **steps)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **steps
    )
    torch.testing.assert_close(ops.swiglu(x), reference.swiglu(x), **steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_rope_and_write(dtype: torch.dtype, quantized: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 36, 128).to("cuda", dtype).split((28, 4, 4), dim=1)
    angles = torch.rand(9, 128).cuda() * 9
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(48)[:9].cuda()
    kind = torch.int8 if quantized else dtype
    stores = []
    for backend in (ops, reference):
        caches = [torch.zeros(3, 16, 4, 128, dtype=kind, device="cuda") for _ in range(2)]
        scales = [
            torch.zeros(3, 16, 4, dtype=torch.float16, device="cuda") if quantized else None
            for _ in range(2)
        ]
        turned = backend.rope_write_kv(q, k, v, cos, sin, *caches, slots, *scales)
        stores.append([turned, *caches, *scales])
    for one, other in zip(*stores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for one, other in zip(ops.rope(q, k, cos, sin), reference.rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
