"""The choice of a code path is a pure table."""

from __future__ import annotations

import pytest
import torch

from mgvq_kernels import dispatch
from mgvq_kernels.layout import VQLayout

LAYOUT = VQLayout.uniform(64, 128, 2)


@pytest.mark.parametrize(
    ("device", "numba", "triton", "order"),
    [
        ("cpu", True, True, "cpu"),
        ("cpu", False, True, "reference"),
        ("cuda", True, True, "triton"),
        ("cuda", True, False, "reference"),
        ("mps", True, True, "reference"),
    ],
)
def test_order_follows_the_device(device: str, numba: bool, triton: bool, order: str) -> None:
    assert dispatch.choose_pack(device, numba, triton) == order


@pytest.mark.parametrize(
    ("op", "rows", "device", "permute", "path"),
    [
        ("vq_linear", 1, "cpu", True, "cpu_lookup"),
        ("vq_linear", dispatch.LOOKUP_ROWS, "cpu", True, "cpu_lookup"),
        ("vq_linear", dispatch.LOOKUP_ROWS + 1, "cpu", True, "cpu_decode"),
        ("vq_linear", dispatch.GATHER_ROWS, "cpu", False, "cpu_lookup"),
        ("vq_linear", dispatch.GATHER_ROWS + 1, "cpu", False, "cpu_decode"),
        ("vq_embedding", 1, "cpu", True, "cpu_decode"),
        ("vq_dequantize", 0, "cpu", True, "cpu_decode"),
        ("vq_linear", dispatch.TRITON_GEMV_ROWS, "cuda", False, "triton_gemv"),
        ("vq_linear", dispatch.TRITON_GEMV_ROWS + 1, "cuda", False, "triton_gemm"),
        ("vq_linear", dispatch.TRITON_GEMM_ROWS, "cuda", False, "triton_gemm"),
        ("vq_linear", dispatch.TRITON_GEMM_ROWS + 1, "cuda", False, "triton_decode"),
        ("vq_embedding", 1, "cuda", False, "triton_decode"),
        ("vq_linear", 1, "xpu", False, "reference"),
    ],
)
def test_path_follows_rows(op: str, rows: int, device: str, permute: bool, path: str) -> None:
    assert dispatch.choose_backend(op, rows, LAYOUT, device, True, True, permute) == path


@pytest.mark.parametrize(
    ("op", "rows", "path"),
    [
        ("vq_linear", dispatch.TRELLIS_LIMITS.gemv, "triton_gemv"),
        ("vq_linear", dispatch.TRELLIS_LIMITS.gemv + 1, "triton_gemm"),
        ("vq_linear", dispatch.TRELLIS_LIMITS.gemm, "triton_gemm"),
        ("vq_linear", dispatch.TRELLIS_LIMITS.gemm + 1, "triton_decode"),
        ("vq_dequantize", 0, "triton_decode"),
    ],
)
def test_a_trellis_heeds_no_limits_that_were_tuned_for_lookups(
    op: str, rows: int, path: str
) -> None:
    layout = VQLayout.uniform(64, 128, 2, codec="trellis")
    tuned = dispatch.RowLimits(16, 32)
    for limits in (dispatch.DEFAULT_LIMITS, tuned):
        chosen = dispatch.choose_backend(op, rows, layout, "cuda", True, True, limits=limits)
        assert chosen == path


def test_full_precision_is_not_for_the_tensor_cores() -> None:
    path = dispatch.choose_backend("vq_linear", 1, LAYOUT, "cuda", True, True, is_half=False)
    assert path == "triton_decode"


def test_nothing_compiled_means_the_reference() -> None:
    for op in dispatch.CHOSEN_OPS:
        for device in ("cpu", "cuda"):
            assert dispatch.choose_backend(op, 1, LAYOUT, device, False, False) == "reference"


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="'vq_conv'"):
        dispatch.choose_backend("vq_conv", 1, LAYOUT, "cpu", True, True)


@pytest.mark.parametrize(
    ("device", "dtype", "one_each", "compilers", "path"),
    [
        ("cuda", torch.float16, True, True, "triton_decode"),
        ("cuda", torch.bfloat16, False, True, "triton_prefill"),
        ("cuda", torch.float32, True, True, "reference"),
        ("cuda", torch.float16, False, False, "reference"),
        ("cpu", torch.float32, True, True, "cpu"),
        ("cpu", torch.float32, False, False, "reference"),
        ("cpu", torch.bfloat16, True, True, "reference"),
    ],
)
def test_attention_follows_the_batch(
    device: str, dtype: torch.dtype, one_each: bool, compilers: bool, path: str
) -> None:
    assert dispatch.choose_attention(device, dtype, one_each, compilers, compilers) == path
