"""The trellis kernels in Triton's interpreter, against the format's definition.

Run by `tests/kernels/test_triton_interpreted.py` in a process of its own, where kernels are
interpreted. bfloat16 is not tried: the interpreter multiplies its raw bits.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mgvq_kernels import ops, reference, trellis_order
from mgvq_kernels.layout import TRELLIS_RATES, Band, Stage, VQLayout, VQWeight
from mgvq_kernels.packing import pack, unpack
from mgvq_kernels.triton import trellis_dequant, trellis_embedding, trellis_gemm, trellis_gemv
from tests.kernels import edge_cases
from tests.kernels.random_weights import oracle, random_weight


def stage(rate: int, window: int = 12) -> tuple[Stage, ...]:
    return (Stage(1, "trellis", rate, window),)


BANDS = (
    Band(0, 32, stage(1)),
    Band(32, 64, stage(3, 8)),
    Band(96, 32, stage(4, 10)),
    Band(128, 160, stage(2)),
    Band(288, 32, stage(5, 11)),
    Band(320, 40, stage(1, 9)),
)
MIXED = VQLayout(130, 360, BANDS, has_permutation=True)
"""Every rate, one of them twice; short windows; ragged blocks and rows; a permutation."""
SHAPES = [(2, 8), (64, 136), (255, 24), (600, 24)]
"""Less bits than a window; part of a tile; a segment of two tiles, the second one ragged."""

TOLERANCE = 3e-4
"""Relative error of float16 outputs whose sums are exact to float32."""


KERNELS = pytest.mark.parametrize("kernel", [trellis_gemv, trellis_gemm], ids=["gemv", "gemm"])
"""Both ways to multiply, which must hold the same promises."""


def linear(
    kernel: ModuleType,
    x: torch.Tensor,
    weight: VQWeight,
    splits: tuple[int, ...],
    **added: torch.Tensor,
) -> torch.Tensor:
    """Call a kernel's custom op with the blocks of each rate cut into `splits` shares."""
    tensors = pack(weight, "triton").tensors
    op, arguments = op_and_arguments(kernel, x, weight, tensors, splits, **added)
    y = op(*arguments)
    assert not tensors["counters"].any(), "counters must end as they began"
    return y


def op_and_arguments(
    kernel: ModuleType,
    x: torch.Tensor,
    weight: VQWeight,
    tensors: dict[str, torch.Tensor],
    splits: tuple[int, ...],
    **added: torch.Tensor,
) -> tuple[Any, list[object]]:
    """Return a kernel's custom op with what it takes; the GEMM's x comes in the order of bands."""
    names = ["codes", "halos", "codebooks", "codebook_scales", "scales", "bands"]
    if kernel is trellis_gemv:
        op = trellis_gemv.triton_trellis_gemv
        names.append("permutation")
    else:
        op = trellis_gemm.triton_trellis_gemm
        x = x[:, tensors["permutation"]]
    blocks = trellis_order.rate_blocks((band.width, band.rate) for band in weight.layout.bands)
    return op, [
        x,
        *(tensors.get(name) for name in (*names, "counters")),
        added.get("bias"),
        added.get("residual"),
        list(blocks),
        list(blocks.values()),
        list(splits),
    ]


def relative_error(y: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.linalg.norm(y.double().numpy() - truth) / np.linalg.norm(truth))


@KERNELS
def test_a_launch_that_fails_leaves_the_weight_usable(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interrupt between the launches of two rates does."""
    weight, x = random_weight(MIXED), torch.randn(3, 360).half()
    tensors = pack(weight, "triton").tensors
    op, arguments = op_and_arguments(kernel, x, weight, tensors, (1, 1, 1, 1, 1))
    expected = op(*arguments)
    name = f"{kernel.__name__.rpartition('.')[2]}_kernel"
    launches = getattr(kernel, name)

    class Interrupted:
        """Launches once, then raises."""

        calls = 0

        def __getitem__(self, grid: object) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise KeyboardInterrupt
            return launches[grid]

    monkeypatch.setattr(kernel, name, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        op(*arguments)
    monkeypatch.undo()
    assert torch.equal(op(*arguments), expected)


@KERNELS
@pytest.mark.parametrize("splits", [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1)])
def test_bands_bias_and_residual_in_one(kernel: ModuleType, splits: tuple[int, ...]) -> None:
    weight = random_weight(MIXED)
    x, residual = torch.randn(3, 360).half(), torch.randn(3, 130).half() * 100
    bias = torch.randn(130)
    y = linear(kernel, x, weight, splits, bias=bias, residual=residual)
    truth = x.double().numpy() @ oracle(weight).T + bias.double().numpy()
    assert relative_error(y, truth + residual.double().numpy()) < TOLERANCE
    again = linear(kernel, x, weight, splits, bias=bias, residual=residual)
    assert torch.equal(y, again), "must repeat to the bit"


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("rate", TRELLIS_RATES)
def test_every_rate_and_shape(rate: int, out_features: int, in_features: int) -> None:
    window = (12, 8, 10)[rate % 3]
    layout = VQLayout.uniform(out_features, in_features, rate, codec="trellis", window=window)
    weight = random_weight(layout)
    packed, dense = pack(weight, "triton"), reference.vq_dequantize(weight, torch.float64)
    x = torch.randn(1, in_features).half()
    for kernel in (trellis_gemv, trellis_gemm):
        y = kernel.linear(x.float(), packed, None, None)  # what a half gives, not rounded
        assert relative_error(y, (x.double() @ dense.T).numpy()) < 1e-5
    exact = reference.vq_dequantize(weight, torch.float32)
    assert torch.equal(trellis_dequant.vq_dequantize(packed, torch.float32), exact)
    ids = torch.tensor([out_features - 1, 0, out_features // 2])
    rows = trellis_embedding.vq_embedding(ids, packed, torch.float32)
    assert torch.equal(rows, exact[ids])


@KERNELS
def test_one_hot_reads_a_column(kernel: ModuleType) -> None:
    """Every index in one test: a wrong place gives another column."""
    weight = random_weight(MIXED)
    column = oracle(weight).astype(np.float32)
    channels = (0, 31, 137, 300, 359)
    y = linear(kernel, torch.eye(360)[list(channels)].half(), weight, (1, 1, 1, 1, 1))
    truth = column[:, channels].T.astype(np.float16)
    np.testing.assert_allclose(y.numpy(), truth, rtol=1e-3)


@pytest.mark.parametrize("rate", TRELLIS_RATES)
def test_the_order_goes_back(rate: int) -> None:
    for rows in (2, 3, 255, 256, 257, 512, 600, 1025):
        layout = VQLayout.uniform(rows, 48, rate, codec="trellis", window=8)
        weight = random_weight(layout, seed=rows)
        back = unpack(pack(weight, "triton"))
        assert torch.equal(back.codes[0][0], weight.codes[0][0])
        assert torch.equal(back.codebooks[0][0], weight.codebooks[0][0])


@KERNELS
@pytest.mark.filterwarnings("ignore:overflow")  # numpy says so of what float16 cannot hold
def test_numbers_stay_in_their_rows(kernel: ModuleType) -> None:
    """NaN reaches its own row only; 6e4 does not overflow; a row does not depend on the others."""
    weight = random_weight(MIXED)
    packed = pack(weight, "triton")
    weight.scales.mul_(2e-3)
    small = pack(weight, "triton")
    x = torch.randn(5, 360).half()
    x[1, 50], x[2] = math.nan, 0.0
    y = kernel.linear(x, packed, None, None)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert not y[2].any()
    for i in (0, 3, 4):
        assert torch.equal(kernel.linear(x[i], packed, None, None), y[i])
    extreme = torch.zeros(1, 360).half()
    extreme[0, ::7] = 6e4
    truth = extreme.double().numpy() @ oracle(weight).T
    scaled = kernel.linear(extreme, small, None, None).double().numpy()
    finite = np.abs(truth) < 6e4
    np.testing.assert_allclose(scaled[finite], truth[finite], rtol=2e-3, atol=1e-2)


@KERNELS
def test_nothing_around_the_weight_is_read_or_written(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a slot before it is written."""
    weight = random_weight(MIXED)
    packed = pack(weight, "triton")
    guarded, guards = edge_cases.between_guards(packed)
    x, ids = torch.randn(2, 360).half(), torch.tensor([129, 0, 77])
    clean = kernel.linear(x, packed, None, None)
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return empty(*shape, **options).fill_(math.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(kernel.linear(x, guarded, None, None), clean)
    dense = reference.vq_dequantize(weight, torch.float16)
    assert torch.equal(trellis_dequant.vq_dequantize(guarded, torch.float16), dense)
    assert torch.equal(trellis_embedding.vq_embedding(ids, guarded, torch.float16), dense[ids])
    outside = torch.tensor([130, -1])
    assert not trellis_embedding.vq_embedding(outside, guarded, torch.float16).any()
    assert all(bool((guard == 255).all()) for guard in guards)


def test_rows_are_decoded_from_any_one_on() -> None:
    weight = random_weight(VQLayout.uniform(600, 72, 2, codec="trellis"))
    packed, dense = pack(weight, "triton"), reference.vq_dequantize(weight, torch.float32)
    assert torch.equal(trellis_dequant.decode_rows(packed, torch.float32, 7, 300), dense[7:300])


def test_many_rows_are_multiplied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(VQLayout.uniform(600, 72, 3, True, codec="trellis"))
    monkeypatch.setattr(trellis_dequant, "slice_rows", lambda *_: 512)
    x, bias = torch.randn(3, 72), torch.randn(600)
    y = trellis_dequant.decode_linear(x, pack(weight, "triton"), bias)
    truth = x.double().numpy() @ oracle(weight).T + bias.double().numpy()
    assert relative_error(y, truth) < 1e-6


@KERNELS
def test_the_custom_op_is_well_formed(kernel: ModuleType) -> None:
    weight, x = random_weight(MIXED), torch.randn(2, 360).half()
    tensors = dict(pack(weight, "triton").tensors)
    op, arguments = op_and_arguments(kernel, x, weight, tensors, (2, 1, 1, 2, 1))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [16, 17, 64])
def test_every_tile_of_the_gemm(rows: int) -> None:
    weight = random_weight(MIXED)
    x = torch.randn(rows, 360).half()
    y = trellis_gemm.linear(x, pack(weight, "triton"), None, None)
    assert relative_error(y, x.double().numpy() @ oracle(weight).T) < TOLERANCE


@pytest.mark.parametrize("permuted", [False, True])
def test_the_front_door_takes_the_kernels(permuted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, chosen by rows; SwiGLU comes first, int8 is not for a trellis."""
    monkeypatch.setattr(ops.dispatch, "choose_pack", lambda *_: "triton")
    weight = random_weight(VQLayout.uniform(64, 72, 2, permuted, codec="trellis"))
    packed, dense = pack(weight, "triton"), torch.from_numpy(oracle(weight))
    for rows in (1, 6, 65):
        x, residual = torch.randn(rows, 2 * 72).half(), torch.randn(rows, 64).half()
        y = ops.vq_linear(x, packed, residual=residual, gated=True, int8_activations=True)
        truth = ops.swiglu(x).double() @ dense.T + residual.double()
        assert relative_error(y, truth.numpy()) < 1e-3
    assert torch.equal(ops.vq_dequantize(packed), ops.vq_dequantize(weight))
    ids = torch.tensor([63, 5])
    assert torch.equal(ops.vq_embedding(ids, packed), ops.vq_dequantize(weight)[ids])
