"""Drawn shapes, unlucky codes and numbers, guarded memory in Triton's interpreter.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import ops
from mgvq_kernels.layout import VQWeight
from mgvq_kernels.packing import pack
from mgvq_kernels.triton import vq_dequant, vq_embedding, vq_gemm, vq_gemv
from tests.kernels import edge_cases


@settings(max_examples=4, deadline=None)
@given(
    weight=edge_cases.weights.filter(lambda weight: weight.layout.in_features < 1536),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17]),
    kind=st.sampled_from(["normal", "one-hot", "alternating", "zero", "subnormal"]),
)
def test_products(weight: VQWeight, tokens: int, kind: str) -> None:
    packed = pack(weight, "triton")
    x = edge_cases.edge_x(tokens, weight.layout.in_features, kind)
    kernel = vq_gemv if tokens <= 4 else vq_gemm
    y = kernel.linear(x.float(), packed, None, None)  # what half precision x gives, not rounded
    edge_cases.assert_product(y, x, weight)


def test_nothing_around_the_weight_is_read_or_written() -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(17, 128, "interleaved"), "random")
    packed = pack(weight, "triton")
    guarded, guards = edge_cases.between_guards(packed)
    x, ids = torch.randn(5, 128).half(), torch.tensor([16, 0])
    for kernel in (vq_gemv, vq_gemm):
        y = kernel.linear(x, packed, None, None)
        assert torch.equal(kernel.linear(x, guarded, None, None), y)
    dense = ops.vq_dequantize(weight)
    assert torch.equal(vq_dequant.vq_dequantize(guarded, torch.float32), dense)
    assert torch.equal(vq_embedding.vq_embedding(ids, guarded, torch.float32), dense[ids])
    assert all(bool((guard == 255).all()) for guard in guards)


@pytest.mark.parametrize("kernel", [vq_gemv, vq_gemm])
def test_views_at_odd_offsets(kernel: object) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(17, 128, "2 bits"), "random")
    packed, bias = pack(weight, "triton"), torch.randn(18).half()[1:]
    x = torch.randn(257).half()[1:].view(2, 128)
    y = kernel.linear(x, packed, bias, None)  # type: ignore[attr-defined]
    assert torch.equal(y, kernel.linear(x.clone(), packed, bias.clone(), None))  # type: ignore[attr-defined]
