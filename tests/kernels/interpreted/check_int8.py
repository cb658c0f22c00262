"""The int8 GEMV in Triton's interpreter, against integers multiplied exactly by torch.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import ops, reference
from mgvq_kernels.layout import VQWeight
from mgvq_kernels.packing import pack
from mgvq_kernels.triton import vq_gemv_int8
from mgvq_kernels.triton.vq_gemv_int8 import triton_vq_gemv_int8
from tests.kernels import edge_cases

LAYOUTS = [("2 bits", 520, 264), ("interleaved", 20, 128), ("one block", 1, 256)]
"""Words of four and of eight int8; ragged rows, a ragged last block, two tiles and more."""


def linear(x: torch.Tensor, weight: VQWeight, splits: int) -> torch.Tensor:
    packed = pack(weight, "triton").tensors
    names = ("codes", "word_books", "codebook_scales", "scales", "stages", "sources", "counters")
    tensors = [packed[name] for name in names]
    y = triton_vq_gemv_int8(x, *tensors, None, None, weight.layout.in_features, splits)
    assert not packed["counters"].any(), "counters must end as they began"
    return y


def make(kind: str, out_features: int, in_features: int) -> VQWeight:
    return edge_cases.edge_weight(edge_cases.edge_layout(out_features, in_features, kind), "random")


@pytest.mark.parametrize(("kind", "out_features", "in_features"), LAYOUTS)
def test_sums_are_exact(kind: str, out_features: int, in_features: int) -> None:
    """With scales that are powers of two every float is exact: equal to the integer oracle."""
    weight = make(kind, out_features, in_features)
    for scales in weight.codebook_scales:
        for scale in scales:
            scale.fill_(0.5)
    weight.scales.fill_(2.0**-7)
    x = torch.randint(-126, 127, (2, in_features)).float()
    x[:, ::4] = 127.0  # every run holds it, so that scales are 1
    y = linear(x, weight, 2)
    assert torch.equal(y.double(), reference.vq_linear_int8(x, weight))
    assert torch.equal(y.double(), reference.vq_linear(x.double(), weight, None))


@settings(max_examples=5, deadline=None)
@given(
    weight=edge_cases.weights.filter(lambda weight: weight.layout.in_features < 1536),
    kind=st.sampled_from(edge_cases.X),
    splits=st.integers(1, 3),
)
def test_rounded_products(weight: VQWeight, kind: str, splits: int) -> None:
    """Equal to the integer oracle but for the order of float32 sums, whose terms are stages: those
    of one weight may cancel; near to what was not rounded.

    Worst case: each channel off by half a step of its run, a 254th of its largest magnitude.
    """
    x = edge_cases.edge_x(2, weight.layout.in_features, kind).float()
    y = linear(x, weight, min(splits, 2))
    truth = reference.vq_linear_int8(x, weight)
    sums = x.double().abs() @ torch.from_numpy(edge_cases.decoded(weight, magnitudes=True)).T
    assert ((y - truth).abs() <= 2e-6 * sums + 1e-6 * truth.abs()).all()
    dense = torch.from_numpy(edge_cases.decoded(weight))
    tops = x.double().abs().amax(1, keepdim=True)
    entries = reference.vq_dequantize(weight, torch.float64).abs().sum(1)
    stages = max(len(band.stages) for band in weight.layout.bands)
    if stages == 1:
        assert ((y - x.double() @ dense.T).abs() <= tops / 253 * entries + 1e-30).all()


def test_the_error_of_rounding_is_about_a_percent() -> None:
    weight = make("2 bits", 256, 384)
    x = torch.randn(4, 384, generator=torch.Generator().manual_seed(0))
    truth = reference.vq_linear(x.double(), weight, None)
    error = float((linear(x, weight, 1) - truth).norm() / truth.norm())
    assert 1e-3 < error < 1.5e-2, error


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy says so of infinity times zero
def test_a_row_stands_alone_and_keeps_its_poison() -> None:
    weight = make("interleaved", 20, 256)
    packed, x = pack(weight, "triton"), torch.randn(4, 256).half()
    x[1, 50], x[2, 60], x[3] = math.nan, math.inf, 0.0
    y = vq_gemv_int8.linear(x, packed, None, None)
    assert not y[1:3].isfinite().any()
    assert not y[3].any()
    assert torch.equal(vq_gemv_int8.linear(x[0], packed, None, None), y[0])
    assert all(torch.equal(vq_gemv_int8.linear(x[:1], packed, None, None), y[:1]) for _ in range(3))


def test_the_front_door_rounds_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "choose_pack", lambda *_: "triton")
    weight = make("interleaved", 20, 256)
    packed = pack(weight, "triton")
    x, bias, residual = torch.randn(2, 512).half(), torch.randn(20), torch.randn(2, 20).half()
    truth = reference.vq_linear_int8(ops.swiglu(x), weight) + bias + residual
    y = ops.vq_linear(x, packed, bias, residual, gated=True, int8_activations=True)
    exact = ops.vq_linear(x, packed, bias, residual, gated=True)
    assert float((y - truth).norm() / truth.norm()) < 5e-4
    assert float((exact - truth).norm() / truth.norm()) > 1e-3
    many = x[:1, :256].expand(6, 256)
    assert torch.equal(
        ops.vq_linear(many, packed, int8_activations=True), ops.vq_linear(many, packed)
    )


def test_the_custom_op_is_well_formed() -> None:
    packed = pack(make("interleaved", 20, 256), "triton").tensors
    names = ("codes", "word_books", "codebook_scales", "scales", "stages", "sources", "counters")
    arguments = (torch.randn(2, 256).half(), *(packed[name] for name in names), None, None, 256, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_vq_gemv_int8, arguments, test_utils=checks)
