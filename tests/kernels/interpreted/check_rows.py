"""Norms, gating, rope and cache writes in Triton's interpreter, against the reference.

The reference itself is held to float64, numpy and transformers in the tests beside this folder.
The interpreter cuts bfloat16 off where a GPU rounds it, so exact bits are asked of float16 only.
Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from mgvq_kernels import reference
from mgvq_kernels.triton import rope_write, row_ops

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_near(y: torch.Tensor, truth: torch.Tensor) -> None:
    """Neighbouring float16 numbers at most, as sums may be taken in another order."""
    steps = 2 if y.dtype == torch.bfloat16 else 1
    torch.testing.assert_close(
        y, truth, rtol=steps * torch.finfo(y.dtype).eps, atol=1e-7, equal_nan=True
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [1, 24, 1536, 3000])
def test_norms(dtype: torch.dtype, width: int) -> None:
    """Ragged widths; 6e4 does not overflow, zeros stay zeros, NaN stays in its row."""
    x, residual, weight = torch.randn(2, 5, width), torch.randn(2, 5, width), torch.rand(width)
    x[0, 1], x[0, 2], x[1, 3, width // 2] = 6e4, 0.0, math.nan
    residual[0, :3] = 0.0
    x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(dtype)
    y = row_ops.rms_norm(x, weight, 1e-6)
    assert_near(y, reference.rms_norm(x, weight, 1e-6))
    assert y[1, 3].isnan().all()
    assert y.isnan().sum() == width
    assert not y[0, 2].any()
    y, total = row_ops.add_rms_norm(x, residual, weight, 1e-6)
    truth, summed = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert_near(total, summed)
    assert_near(y, truth)
    assert row_ops.rms_norm(x[:, :0], weight, 1e-6).shape == (2, 0, width)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp(6e4), and 6e4 squared is infinite
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("features", [3, 1040])
def test_swiglu(dtype: torch.dtype, features: int) -> None:
    gate_up = torch.randn(4, 2 * features).to(dtype)
    gate_up[1], gate_up[2, 0] = 6e4, math.nan
    gate_up[3, :features] = -6e4
    y = row_ops.swiglu(gate_up)
    assert_near(y, reference.swiglu(gate_up))
    assert y.isnan().sum() == 1
    assert not y[3].any()
    assert row_ops.swiglu(gate_up[:0]).shape == (0, features)


class Tokens:
    """Queries, keys and values side by side in one tensor, as a fused projection leaves them."""

    def __init__(self, dim: int = 12) -> None:
        qkv = torch.randn(3, 4 + 2 * 2, dim)
        qkv[0, 4], qkv[0, 5], qkv[1, 4] = 0.0, 1e-7, 6e4 / dim
        qkv[2, 7, 1] = math.nan
        self.q, self.k, self.v = qkv.half().split((4, 2, 2), dim=1)
        angles = torch.rand(3, dim) * 9
        self.cos, self.sin = angles.cos(), angles.sin()
        self.slots = torch.tensor([7, 0, 10])

    def caches(self, quantized: bool) -> list[torch.Tensor | None]:
        """Caches and scales filled with a number that a stray write would change."""
        kind = torch.int8 if quantized else self.k.dtype
        full = [torch.full((3, 4, *self.k.shape[1:]), 99, dtype=kind) for _ in range(2)]
        scales = [torch.full((3, 4, 2), 0.75).half() if quantized else None for _ in range(2)]
        return [*full, *scales]


def test_rope_to_the_bit() -> None:
    tokens = Tokens()
    for y, truth in zip(
        rope_write.rope(tokens.q, tokens.k, tokens.cos, tokens.sin),
        reference.rope(tokens.q, tokens.k, tokens.cos, tokens.sin),
        strict=True,
    ):
        assert torch.equal(y, truth)


@pytest.mark.parametrize("quantized", [False, True])
def test_writes_to_the_bit(quantized: bool) -> None:
    """The codes and scales of zeros, tiny numbers and NaN included."""
    t = Tokens()
    angles = (t.cos, t.sin)
    for turned in (False, True):
        written, expected = t.caches(quantized), t.caches(quantized)
        for backend, (keys, values, *scales) in ((rope_write, written), (reference, expected)):
            if turned:
                q = backend.rope_write_kv(t.q, t.k, t.v, *angles, keys, values, t.slots, *scales)
                assert torch.equal(q, reference.rope(t.q, t.k, *angles)[0])
            else:
                backend.write_kv(t.k, t.v, keys, values, t.slots, *scales)
        for one, other in zip(written, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
