"""Linear, decoding and embedding kernels in Triton's interpreter, against the format's definition.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own, where kernels are
interpreted. bfloat16 is not tried: the interpreter multiplies its raw bits.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from mgvq_kernels import block_order, ops, reference
from mgvq_kernels.layout import Band, Stage, VQLayout, VQWeight
from mgvq_kernels.packing import pack
from mgvq_kernels.triton import vq_dequant, vq_embedding, vq_gemm, vq_gemv
from tests.kernels.random_weights import oracle, random_weight

BANDS = (Band(0, 32, (Stage(4), Stage(8))), Band(32, 64, (Stage(2),)), Band(96, 40, (Stage(1),)))
MIXED = VQLayout(20, 136, BANDS, has_permutation=True)
"""Every dimension, two stages, padded groups, padded rows, a permutation; d up to 8."""
LONG = VQLayout.uniform(520, 264, 2)
"""Two tiles of rows, three blocks, the last one ragged; d is 4."""

TOLERANCE = 3e-4
"""Relative error of float16 outputs whose sums are exact to float32."""


def linear(
    kernel: ModuleType, x: torch.Tensor, weight: VQWeight, splits: int, **added: torch.Tensor
) -> torch.Tensor:
    """Call the custom op of a kernel with its blocks cut into `splits` shares."""
    packed = pack(weight, "triton").tensors
    op = vq_gemv.triton_vq_gemv if kernel is vq_gemv else vq_gemm.triton_vq_gemm
    books = packed["diagonal_books" if kernel is vq_gemv else "word_books"]
    names = ("codebook_scales", "scales", "stages", "sources", "counters")
    rest = [packed[name] for name in names]
    bias, residual = added.get("bias"), added.get("residual")
    y = op(x, packed["codes"], books, *rest, bias, residual, weight.layout.in_features, splits)
    assert not packed["counters"].any(), "counters must end as they began"
    return y


def relative_error(y: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.linalg.norm(y.double().numpy() - truth) / np.linalg.norm(truth))


CASES = [
    (vq_gemv, MIXED, 1, 1),
    (vq_gemv, MIXED, 3, 4),
    (vq_gemv, LONG, 1, 2),
    (vq_gemm, MIXED, 5, 4),
    (vq_gemm, LONG, 17, 1),
    (vq_gemm, LONG, 16, 3),
]


@pytest.mark.parametrize(("kernel", "layout", "tokens", "splits"), CASES)
def test_product(kernel: ModuleType, layout: VQLayout, tokens: int, splits: int) -> None:
    weight = random_weight(layout)
    x = torch.randn(tokens, layout.in_features).half()
    y = linear(kernel, x, weight, splits)
    assert relative_error(y, x.double().numpy() @ oracle(weight).T) < TOLERANCE
    assert torch.equal(y, linear(kernel, x, weight, splits)), "must repeat to the bit"


@pytest.mark.parametrize("kernel", [vq_gemv, vq_gemm])
def test_bias_residual_and_gate_are_fused(kernel: ModuleType) -> None:
    weight = random_weight(MIXED)
    gate, up = torch.randn(2, 2, 136).half()
    bias, residual = torch.randn(20), torch.randn(2, 20).half() * 100
    y = linear(kernel, torch.cat((gate, up), -1), weight, 2, bias=bias, residual=residual)
    product = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    truth = product.half().double().numpy() @ oracle(weight).T
    truth += bias.double().numpy() + residual.double().numpy()
    assert relative_error(y, truth) < TOLERANCE


@pytest.mark.parametrize("kernel", [vq_gemv, vq_gemm])
def test_one_hot_reads_a_column(kernel: ModuleType) -> None:
    """Every index in one test: a wrong place gives another column."""
    weight = random_weight(MIXED)
    column = oracle(weight).astype(np.float32)
    for channel in (0, 31, 77, 135):
        x = torch.zeros(1, 136).half()
        x[0, channel] = 1.0
        y = linear(kernel, x, weight, 1)
        np.testing.assert_allclose(y[0].numpy(), column[:, channel].astype(np.float16), rtol=1e-3)


@pytest.mark.parametrize("kernel", [vq_gemv, vq_gemm])
def test_numbers_stay_in_their_rows(kernel: ModuleType) -> None:
    """NaN reaches its own row only; 6e4 does not overflow; the smallest half is not flushed."""
    weight = random_weight(MIXED)
    small = VQWeight(
        MIXED, weight.codes, weight.codebooks, weight.codebook_scales, weight.scales * 2e-3,
        weight.permutation,
    )  # fmt: skip
    x = torch.randn(3, 136).half()
    x[1, 50], x[2] = math.nan, 0.0
    y = linear(kernel, x, weight, 2)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert not y[2].any()
    extreme = torch.zeros(2, 136).half()
    extreme[0, ::7], extreme[1] = 6e4, 2.0**-24
    truth = extreme.double().numpy() @ oracle(small).T
    scaled = linear(kernel, extreme, small, 2).double().numpy()
    finite = np.abs(truth) < 6e4
    np.testing.assert_allclose(scaled[finite], truth[finite], rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("codes", ["zero", "last", "same place"])
def test_unlucky_codes(codes: str) -> None:
    weight = random_weight(LONG)
    for stage in (stage for stages in weight.codes for stage in stages):
        if codes == "same place":
            stage.copy_((torch.arange(stage.numel()) * 32 % 256).view(stage.shape))
        else:
            stage.fill_(0 if codes == "zero" else 255)
    x = torch.randn(1, 264).half()
    truth = x.double().numpy() @ oracle(weight).T
    assert relative_error(linear(vq_gemv, x, weight, 1), truth) < TOLERANCE


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    weight = random_weight(LONG)
    packed = pack(weight, "triton")
    x = torch.randn(9, 264).half()
    whole = vq_gemv.linear(x, packed, None, None)
    for i in (0, 7, 8):
        assert torch.equal(vq_gemv.linear(x[i], packed, None, None), whole[i])


def test_slots_are_not_read_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(LONG)
    x = torch.randn(2, 264).half()
    clean = linear(vq_gemv, x, weight, 3)
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return empty(*shape, **options).fill_(math.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(linear(vq_gemv, x, weight, 3), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoding_is_exact(dtype: torch.dtype) -> None:
    weight = random_weight(MIXED)
    packed = pack(weight, "triton")
    dense = reference.vq_dequantize(weight, dtype)
    assert torch.equal(vq_dequant.vq_dequantize(packed, dtype), dense)
    assert weight.permutation is not None
    as_stored = dense[7:19, weight.permutation.long()]
    assert torch.equal(vq_dequant.decode_rows(packed, dtype, 7, 19), as_stored)
    ids = torch.tensor([19, 0, 5])
    assert torch.equal(vq_embedding.vq_embedding(ids, packed, dtype), dense[ids])
    assert not vq_embedding.vq_embedding(torch.tensor([20, -1]), packed, dtype).any()


def test_many_rows_are_multiplied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(LONG)
    monkeypatch.setattr(vq_dequant, "slice_rows", lambda *_: 512)
    x, bias = torch.randn(3, 264), torch.randn(520)
    y = vq_dequant.decode_linear(x, pack(weight, "triton"), bias)
    truth = x.double().numpy() @ oracle(weight).T + bias.double().numpy()
    assert relative_error(y, truth) < 1e-6


@pytest.mark.parametrize("kernel", [vq_gemv, vq_gemm])
def test_custom_ops_are_well_formed(kernel: ModuleType) -> None:
    packed = pack(random_weight(MIXED), "triton").tensors
    op = vq_gemv.triton_vq_gemv if kernel is vq_gemv else vq_gemm.triton_vq_gemm
    books = packed["diagonal_books" if kernel is vq_gemv else "word_books"]
    names = ("codebook_scales", "scales", "stages", "sources", "counters")
    rest = [packed[name] for name in names]
    arguments = (torch.randn(2, 136).half(), packed["codes"], books, *rest, None, None, 136, 2)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_front_door_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, chosen by rows."""
    monkeypatch.setattr(ops.dispatch, "choose_pack", lambda *_: "triton")
    weight = random_weight(MIXED)
    packed = pack(weight, "triton")
    dense = torch.from_numpy(oracle(weight))
    for rows in (1, 6, 66):
        x, residual = torch.randn(rows, 2 * 136).half(), torch.randn(rows, 20).half()
        y = ops.vq_linear(x, packed, residual=residual, gated=True)
        truth = ops.swiglu(x).double() @ dense.T + residual.double()
        assert relative_error(y, truth.numpy()) < 1e-3
    assert block_order.padded_rows(20) == 512
