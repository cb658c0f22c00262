"""The Triton kernels: interpreted on tiny shapes, compiled for five GPUs, run where one is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mgvq_kernels import ops, reference
from mgvq_kernels.layout import pack
from tests.kernels.random_weights import MIXED, random_weight

pytest.importorskip("triton", reason="triton has no wheel for this platform")

INTERPRETED = """
import torch
from mgvq_kernels import reference
from mgvq_kernels.layout import Band, Stage, VQLayout, pack
from mgvq_kernels.triton import vq_dequant, vq_embedding, vq_linear
from tests.kernels.random_weights import random_weight

torch.manual_seed(0)
bands = (Band(0, 32, (Stage(4), Stage(8))), Band(32, 64, (Stage(2),)), Band(96, 40, (Stage(1),)))
for permuted, dtype in ((True, torch.float32), (False, torch.float16)):
    weight = random_weight(VQLayout(20, 136, bands, permuted))
    packed = pack(weight, "triton")
    dense = reference.vq_dequantize(weight, dtype)
    assert torch.equal(vq_dequant.vq_dequantize(packed, dtype), dense)
    ids = torch.tensor([19, 0, 5])
    assert torch.equal(vq_embedding.vq_embedding(ids, packed, dtype), dense[ids])
    assert not vq_embedding.vq_embedding(torch.tensor([20, -1]), packed, dtype).any()
    x, bias = torch.randn(2, 136).to(dtype), torch.randn(20).to(dtype)
    for b in (bias, None):
        y = vq_linear.vq_linear(x, packed, b)
        truth = reference.vq_linear(x.double(), weight, None if b is None else b.double())
        error = ((y - truth).norm() / truth.norm()).item()
        assert error < (1e-6 if dtype == torch.float32 else 5e-4), (dtype, error)
    hot = torch.zeros(1, 136, dtype=dtype)
    hot[0, 77] = 1.0
    torch.testing.assert_close(vq_linear.vq_linear(hot, packed, None)[0], dense[:, 77])
    hot[0, 3] = torch.nan
    y = vq_linear.vq_linear(torch.cat([x[:1], hot]), packed, None)
    assert y[1].isnan().all() and not y[0].isnan().any()
names = ("codes", "codebooks", "codebook_scales", "scales", "schedule")
arguments = [packed.tensors[name] for name in names]
checks = ("test_schema", "test_faketensor")
torch.library.opcheck(
    vq_linear.triton_vq_linear, (x, *arguments, None, bias), test_utils=checks
)
"""


def test_interpreted_kernels_agree_with_the_reference() -> None:
    """vq_linear, vq_dequantize and vq_embedding, float16 and float32."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", INTERPRETED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "fp16"), (86, "fp32"), (87, "fp16"), (89, "fp16"), (90, "bf16")]
)
def test_kernels_compile_without_spilling(capability: int, dtype: str) -> None:
    """Every kernel once a GPU, the dtypes taking turns; the slow test covers the rest."""
    assert_lean(capability, f"-{dtype}-permuted")


@pytest.mark.slow
@pytest.mark.parametrize("permuted", ["", "-permuted"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_variant_compiles_without_spilling(dtype: str, permuted: str) -> None:
    assert_lean(80, f"-{dtype}{permuted}")


def assert_lean(capability: int, ending: str) -> None:
    from mgvq_kernels.triton import aot

    assert capability in aot.CAPABILITIES
    chosen = [variant for variant in aot.variants() if variant.name.endswith(ending)]
    assert len(chosen) == 3
    for variant in chosen:
        used = aot.compile_for(variant, capability)
        assert (used.stack_bytes, used.local_bytes, used.spills) == (0, 0, 0), (variant.name, used)
        assert used.registers * 128 <= 65536
        assert used.shared_bytes <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8, 9, 64])
def test_gpu_agrees_with_the_reference(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = random_weight(MIXED)
    packed = ops.pack_for(weight, "cuda")
    assert packed.backend == "triton"
    x, bias = torch.randn(rows, 424).to(dtype), torch.randn(150).to(dtype)
    truth = reference.vq_linear(x.double(), weight, bias.double())
    y = ops.vq_linear(x.cuda(), packed, bias.cuda())
    again = ops.vq_linear(x.cuda(), packed, bias.cuda())
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-3}[dtype]
    assert torch.equal(y, again)
    assert float((y.cpu() - truth).norm() / truth.norm()) < tolerance


@pytest.mark.gpu
def test_gpu_decodes_the_same_bits() -> None:
    weight = random_weight(MIXED)
    packed = ops.pack_for(weight, "cuda")
    assert torch.equal(ops.vq_dequantize(packed).cpu(), ops.vq_dequantize(weight))
    ids = torch.tensor([149, 0, 63], device="cuda")
    rows = ops.vq_embedding(ids, packed, torch.bfloat16)
    assert torch.equal(rows.cpu(), ops.vq_dequantize(weight, torch.bfloat16)[ids.cpu()])


def test_the_flat_order_runs_on_any_device_through_the_reference() -> None:
    weight = random_weight(MIXED)
    x = torch.randn(2, 424, dtype=torch.float64)
    y = ops.vq_linear(x, pack(weight, "triton"))
    assert torch.equal(y, reference.vq_linear(x, weight, None))
