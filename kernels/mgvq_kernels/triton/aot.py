"""Ahead-of-time compilation of every kernel for a GPU that is not there (called by tests).

`compile_for` turns one variant of a kernel into machine code for a compute capability and reads
its resource use back; `variants` lists what the front door can launch. Needs no driver: triton's
wheel carries the assembler.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mgvq_kernels.triton import vq_dequant, vq_embedding, vq_linear

CAPABILITIES = (80, 86, 87, 89, 90)
"""A100, RTX 30, Jetson Orin, RTX 40, H100 and H200."""

WEIGHT_POINTERS = {
    "codes_ptr": "*u8",
    "books_ptr": "*i8",
    "book_scales_ptr": "*fp32",
    "scales_ptr": "*fp16",
    "schedule_ptr": "*i64",
    "permutation_ptr": "*i32",
}
SIZES = {"out_features": "i32", "in_features": "i32", "stage_count": "i32"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with argument types and compile-time values."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks of a streaming multiprocessor."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    spills: int


def variants() -> Iterator[Variant]:
    """List every kernel over the dtypes, with and without permutation and bias."""
    for dtype, permuted in itertools.product(("fp16", "bf16", "fp32"), (False, True)):
        mark = f"{dtype}{'-permuted' if permuted else ''}"
        constants = {"HAS_PERMUTATION": permuted, "BLOCK_I": vq_dequant.BLOCK_I}
        yield Variant(
            f"vq_linear-{mark}",
            vq_linear.vq_linear_kernel,
            {"x_ptr": f"*{dtype}", **WEIGHT_POINTERS, "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            | SIZES,
            constants
            | {"HAS_BIAS": permuted, "BLOCK_O": vq_linear.BLOCK_O, "BLOCK_I": vq_linear.BLOCK_I},
            {"enable_fp_fusion": True},
        )
        yield Variant(
            f"vq_dequant-{mark}",
            vq_dequant.vq_dequant_kernel,
            {**WEIGHT_POINTERS, "out_ptr": f"*{dtype}"} | SIZES,
            {**constants, "BLOCK_O": vq_dequant.BLOCK_O},
            {"enable_fp_fusion": False},
        )
        yield Variant(
            f"vq_embedding-{mark}",
            vq_embedding.vq_embedding_kernel,
            {"ids_ptr": "*i64", **WEIGHT_POINTERS, "out_ptr": f"*{dtype}"} | SIZES,
            {"HAS_PERMUTATION": permuted, "BLOCK_I": vq_embedding.BLOCK_I},
            {"enable_fp_fusion": False},
        )


def compile_for(variant: Variant, capability: int) -> Resources:
    """Compile a variant for a compute capability.

    Args:
        variant: one of `variants()`.
        capability: ten times the compute capability, such as 90.

    Returns:
        What the machine code uses.

    Raises:
        RuntimeError: if the disassembler does not say.
    """
    names = variant.kernel.arg_names
    types = {n: variant.signature.get(n, "constexpr") for n in names}
    pointers = [i for i, n in enumerate(names) if types[n].startswith("*")]
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in variant.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, **variant.options},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", binary)
        code = _output(tools / "nvdisasm", "-c", binary)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about {variant.name}: {usage}")
    registers, stack, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Resources(registers, stack, local, compiled.metadata.shared, spills)


def _output(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout
