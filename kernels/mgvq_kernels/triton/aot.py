"""Ahead-of-time compilation of every kernel for a GPU that is not there (called by tests).

`compile_for` turns one variant of a kernel into machine code for a compute capability and reads
its resource use back; `variants` lists what the front door can launch. Needs no driver: triton's
wheel carries the assembler.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 87, 89, 90)
"""A100, RTX 30, Jetson Orin, RTX 40, H100 and H200."""

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory a program may use, by capability."""

REGISTERS = 65536
"""Registers of a multiprocessor, on every capability above."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with argument types and compile-time values."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Argument types by name; what is not named is a compile-time value."""
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    """Integer arguments that are always multiples of 16, as pointers are."""
    loop_weights: int = 0
    """Weights one thread handles in one turn of the main loop; 0 where that is not counted."""
    wide_loads: bool = False
    """Whether the main loop must load 16 bytes at a time."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks of a streaming multiprocessor."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    spills: int
    wide_loads: int
    """16-byte loads from memory."""
    loop_instructions: int
    """Instructions of the longest loop that holds no other."""


def compile_for(variant: Variant, capability: int) -> Resources:
    """Compile a variant for a compute capability.

    Args:
        variant: one of `variants.variants()`.
        capability: ten times the compute capability, such as 90.

    Returns:
        What the machine code uses.

    Raises:
        RuntimeError: if the disassembler does not say.
    """
    names = variant.kernel.arg_names
    types = {n: variant.signature.get(n, "constexpr") for n in names}
    aligned = [i for i, n in enumerate(names) if types[n][0] == "*" or n in variant.aligned]
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in variant.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True, **variant.options},
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
    return Resources(
        registers,
        stack,
        local,
        compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.\S*128|\bLDGSTS\.\S*128", code)),
        loop_instructions=longest_inner_loop(code),
    )


def longest_inner_loop(code: str) -> int:
    """Count the instructions of the longest loop that holds no other loop.

    Args:
        code: a disassembly by nvdisasm, with labels.

    Returns:
        0 if there is no loop.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    place = 0
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = place
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line)
        if instruction:
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if target and labels.get(target[1], place) < place:
                loops.append((labels[target[1]], place))
            place += 1
    inner = [
        end - start + 1
        for start, end in loops
        if not any(
            (start, end) != other and start <= other[0] <= other[1] <= end for other in loops
        )
    ]
    return max(inner, default=0)


def _output(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout
