"""Every kernel compiled for five GPUs that are not there, and run where one is."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from benchmarks.gpu_suite.weights import TRELLIS_MIXED
from mgvq_kernels import ops, reference
from mgvq_kernels.layout import VQLayout
from mgvq_kernels.packing import pack
from tests.kernels.random_weights import MIXED, random_weight

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from mgvq_kernels.triton import aot, variants

MAIN = {variant.name: variant for variant in variants.main_variants()}
TURNS = [(name, aot.CAPABILITIES[i % 5]) for i, name in enumerate(MAIN)]


@pytest.mark.parametrize(("name", "capability"), TURNS)
def test_main_variants_are_lean(name: str, capability: int) -> None:
    """Every kernel once, the GPUs taking turns; the slow test covers the rest."""
    assert_lean(MAIN[name], capability, aot.compile_for(MAIN[name], capability))


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    """A process a core: one alone takes a quarter of an hour for everything."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_every_variant_is_lean(capability: int, compilers: ProcessPoolExecutor) -> None:
    every = list(variants.variants())
    compiled = compilers.map(compile_nth, range(len(every)), itertools.repeat(capability))
    for variant, used in zip(every, compiled, strict=True):
        assert_lean(variant, capability, used)


def compile_nth(n: int, capability: int) -> aot.Resources:
    """Compile one of `variants()` by its place: a kernel cannot be sent to another process."""
    variant = next(itertools.islice(variants.variants(), n, None))
    return aot.compile_for(variant, capability)


def assert_lean(variant: aot.Variant, capability: int, used: aot.Resources) -> None:
    """Nothing on the stack, nothing spilled, within the GPU's limits, wide loads where due."""
    assert (used.stack_bytes, used.local_bytes, used.spills) == (0, 0, 0), (variant.name, used)
    threads = 32 * variant.options.get("num_warps", 4)
    assert used.registers * threads <= aot.REGISTERS, (variant.name, used)
    assert used.shared_bytes <= aot.SHARED_BYTES[capability], (variant.name, used)
    assert used.wide_loads or not variant.wide_loads, f"{variant.name} loads no 16 bytes at once"


def test_a_loop_is_found_in_machine_code() -> None:
    """Known answer: the inner loop has 3 instructions, the outer one holds it."""
    code = """
.L_x_0:
        /*0000*/   MOV R1, R2 ;
.L_x_1:
        /*0010*/   FADD R1, R1, R2 ;
        /*0020*/   ISETP.NE P0, R1, RZ ;
        /*0030*/   @P0 BRA `(.L_x_1) ;
        /*0040*/   @P1 BRA `(.L_x_0) ;
        /*0050*/   @P1 BRA `(.L_x_2) ;
.L_x_2:
        /*0060*/   EXIT ;
"""
    assert aot.longest_inner_loop(code) == 3
    assert aot.longest_inner_loop("        /*0000*/   EXIT ;") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 65])
@pytest.mark.parametrize("layout", [MIXED, TRELLIS_MIXED], ids=["lookup", "trellis"])
def test_gpu_agrees_with_the_reference(layout: VQLayout, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = random_weight(layout)
    packed = ops.pack_for(weight, "cuda")
    assert packed.backend == "triton"
    x, bias = torch.randn(rows, 424).to(dtype), torch.randn(layout.out_features).to(dtype)
    truth = reference.vq_linear(x.double(), weight, bias.double())
    y = ops.vq_linear(x.cuda(), packed, bias.cuda())
    again = ops.vq_linear(x.cuda(), packed, bias.cuda())
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-3}[dtype]
    assert torch.equal(y, again)
    assert float((y.cpu() - truth).norm() / truth.norm()) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [MIXED, TRELLIS_MIXED], ids=["lookup", "trellis"])
def test_gpu_decodes_the_same_bits(layout: VQLayout) -> None:
    weight = random_weight(layout)
    packed = ops.pack_for(weight, "cuda")
    assert torch.equal(ops.vq_dequantize(packed).cpu(), ops.vq_dequantize(weight))
    ids = torch.tensor([149, 0, 63], device="cuda")
    rows = ops.vq_embedding(ids, packed, torch.bfloat16)
    assert torch.equal(rows.cpu(), ops.vq_dequantize(weight, torch.bfloat16)[ids.cpu()])


@pytest.mark.parametrize("layout", [MIXED, TRELLIS_MIXED], ids=["lookup", "trellis"])
def test_the_gpu_order_runs_on_any_device_through_the_reference(layout: VQLayout) -> None:
    weight = random_weight(layout)
    x = torch.randn(2, 424, dtype=torch.float64)
    y = ops.vq_linear(x, pack(weight, "triton"))
    assert torch.equal(y, reference.vq_linear(x, weight, None))
