"""The trellis on a CPU: bit for bit the reference's weights, and products as float32 sums allow."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import cpu, cpu_trellis, dispatch, ops, reference, torch_ops
from mgvq_kernels.layout import (
    TRELLIS_RATES,
    TRELLIS_WINDOWS,
    Band,
    PackedVQ,
    VQLayout,
    VQWeight,
    rate_stages,
)
from mgvq_kernels.packing import pack, unpack
from tests.kernels.edge_cases import assert_product, between_guards
from tests.kernels.random_weights import random_weight
from tests.kernels.test_trellis import MIXED

WIDTH = MIXED.in_features
ROWS = (2, 3, 63, 64, 65, 255, 256, 257, 511, 512, 513, 700)


@st.composite
def weights(draw: st.DrawFn) -> VQWeight:
    widths = [32 * draw(st.integers(1, 5)) for _ in range(draw(st.integers(0, 3)))]
    widths.append(8 * draw(st.integers(1, 20)))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    rates, windows = st.sampled_from(TRELLIS_RATES), st.sampled_from(TRELLIS_WINDOWS)
    bands = tuple(
        Band(start, width, rate_stages(draw(rates), "trellis", draw(windows)))
        for start, width in zip(starts, widths, strict=True)
    )
    layout = VQLayout(draw(st.sampled_from(ROWS)), sum(widths), bands, draw(st.booleans()))
    return random_weight(layout, draw(st.integers(0, 9)))


def flat(weight: VQWeight) -> list[torch.Tensor]:
    nested = (*weight.codes, *weight.codebooks, *weight.codebook_scales)
    return [tensor for stages in nested for tensor in stages] + [weight.scales]


@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_order_and_weights_are_exact(weight: VQWeight) -> None:
    packed = pack(weight, "cpu")
    back = unpack(packed)
    assert all(map(torch.equal, flat(back), flat(weight)))
    assert back.layout == weight.layout
    dense = reference.vq_dequantize(weight, torch.float32)
    assert torch.equal(ops.vq_dequantize(packed), dense)
    ids = torch.tensor([weight.layout.out_features - 1, 0, 1, 0])
    assert torch.equal(ops.vq_embedding(ids, packed), dense[ids])


@settings(max_examples=25, deadline=None)
@given(
    weight=weights(),
    tokens=st.sampled_from([1, dispatch.TRELLIS_ROWS, dispatch.TRELLIS_ROWS + 1, 9]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_products(weight: VQWeight, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.layout.in_features, generator=generator).to(dtype)
    assert_product(ops.vq_linear(x, pack(weight, "cpu")), x, weight)


def test_bias_residual_gate_and_gradient() -> None:
    weight = random_weight(MIXED)
    packed, dense = pack(weight, "cpu"), reference.vq_dequantize(weight, torch.float32)
    x, bias, residual = torch.randn(2, 2 * WIDTH), torch.randn(300), torch.randn(2, 300)
    y = ops.vq_linear(x, packed, bias, residual, gated=True)
    truth = ops.swiglu(x).double() @ dense.T.double() + bias + residual
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-3)
    x = torch.randn(1, WIDTH, requires_grad=True)
    ops.vq_linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0, keepdim=True), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_do_not_change_the_result(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(VQLayout.uniform(700, 512, 2, codec="trellis"))
    packed, x = pack(weight, "cpu"), torch.randn(tokens, 512)
    alone = ops.vq_linear(x, packed), ops.vq_dequantize(packed)
    monkeypatch.setattr(cpu, "THREAD_CODES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = ops.vq_linear(x, packed), ops.vq_dequantize(packed)
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("tokens", [1, 9])
def test_nothing_around_the_weight_is_read_or_written(tokens: int) -> None:
    packed = pack(random_weight(MIXED), "cpu")
    guarded, guards = between_guards(packed)
    x, ids = torch.randn(tokens, WIDTH), torch.tensor([299, 0, 256])
    assert torch.equal(ops.vq_linear(x, guarded), ops.vq_linear(x, packed))
    assert torch.equal(ops.vq_dequantize(guarded), ops.vq_dequantize(packed))
    assert torch.equal(ops.vq_embedding(ids, guarded), ops.vq_embedding(ids, packed))
    assert all(bool((guard == 255).all()) for guard in guards)


@pytest.mark.parametrize("out_features", [2, 63, 65])
def test_nothing_around_the_output_is_written(out_features: int) -> None:
    weight = random_weight(VQLayout.uniform(out_features, 72, 3, codec="trellis"))
    packed, x, ids = pack(weight, "cpu"), torch.randn(2, 72), torch.tensor([out_features - 1])
    at_x, at = x.data_ptr(), packed.address
    for size, run in (
        (2 * out_features, lambda y: cpu_trellis.multiply(at_x, y, 0, 2, at, 0, packed.strips)),
        (out_features * 72, lambda y: cpu_trellis.decode(y, at, 0, packed.strips)),
        (72, lambda y: cpu_trellis.take_rows(ids.data_ptr(), 1, y, at)),
    ):
        room = torch.full((size + 64,), float("nan"))
        run(room.data_ptr() + 4 * 32)
        assert room[32:-32].isfinite().all()
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()


def test_poison_stays_in_its_row() -> None:
    packed = pack(random_weight(MIXED), "cpu")
    x = torch.randn(2, WIDTH)
    clean = ops.vq_linear(x, packed)
    x[1, 100] = float("nan")
    y = ops.vq_linear(x, packed)
    assert torch.equal(y[0], clean[0])
    assert y[1].isnan().all()


def test_tensors_of_the_wrong_size_are_named() -> None:
    packed = pack(random_weight(MIXED), "cpu")
    for name in ("codes", "codebooks", "codebook_scales", "row_scales", "order", "bands"):
        for wrong in (packed.tensors[name][:-1], packed.tensors[name].repeat_interleave(2, 0)[::2]):
            with pytest.raises(ValueError, match=f"{name} must be contiguous and hold"):
                PackedVQ("cpu", MIXED, packed.device, {**packed.tensors, name: wrong})


def test_copies_own_their_memory_and_the_memory_is_counted() -> None:
    weight = random_weight(MIXED)
    packed = pack(weight, "cpu")
    twin = copy.deepcopy(packed)
    assert twin.tensors["codes"].data_ptr() == int(twin.tensors["descriptor"][0])
    assert all(map(torch.equal, flat(unpack(twin)), flat(weight)))
    books = sum(stage.codebook_size for band in MIXED.bands for stage in band.stages)
    scales, order = 300 * (2 + 4), 2 * 4 * WIDTH
    bands = len(MIXED.bands) * (6 * 8 + 4)
    codes = 300 * MIXED.codes_per_row
    assert packed.num_codes == codes
    assert packed.nbytes == codes + books + scales + order + bands + 9 * 8


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_flattened_weight_comes_back(backend: str) -> None:
    weight = pack(random_weight(MIXED), backend)
    back = torch_ops.unflatten(*torch_ops.flatten(weight))
    assert (back.backend, back.layout) == (backend, MIXED)
    x = torch.randn(2, WIDTH)
    flattened = torch.ops.mgvq.vq_linear(x, *torch_ops.flatten(weight), None, None, False)
    assert torch.equal(flattened, ops.vq_linear(x, weight))


@pytest.mark.parametrize(
    ("op", "rows", "device", "path"),
    [
        ("vq_linear", dispatch.TRELLIS_ROWS, "cpu", "cpu_trellis"),
        ("vq_linear", dispatch.TRELLIS_ROWS + 1, "cpu", "cpu_decode"),
        ("vq_dequantize", 0, "cpu", "cpu_decode"),
        ("vq_embedding", 1, "cpu", "cpu_decode"),
        ("vq_linear", 1, "mps", "reference"),
    ],
)
def test_paths(op: str, rows: int, device: str, path: str) -> None:
    assert dispatch.choose_backend(op, rows, MIXED, device, True, True) == path


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(MIXED), torch.randn(1, WIDTH)
    assert ops.pack_for(weight, "cpu").backend == "cpu"
    monkeypatch.setattr(ops, "has_numba", lambda: False)
    packed = ops.pack_for(weight, "cpu")
    assert packed.backend == "reference"
    assert_product(ops.vq_linear(x, packed), x, weight)
