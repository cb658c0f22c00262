# mypy: disable-error-code="untyped-decorator"
"""How the cpu kernels are compiled and reach memory (called by the `cpu_*` files).

They are compiled on first use and kept on disk; arguments are raw addresses, because a call with
arrays costs more than a small matrix does.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types  # noqa: TID253 (this file is made of it)
from numba.core import cgutils  # noqa: TID253
from numba.extending import intrinsic  # noqa: TID253


def compile_cached(function: Callable[..., Any]) -> Any:
    """Compile on first call and keep the machine code on disk, where some folder can be written.

    The name it is kept under holds a digest of every file a kernel is made of: numba looks at the
    function's own only, and code that took its constants from another one must not outlive them.
    """
    function.__qualname__ += f"_{_sources_digest():08x}"
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no writable cache folder
        return njit(nogil=True)(function)


@functools.cache
def _sources_digest() -> int:
    """CRC-32 of the files the kernels and their constants are in."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("cpu_*.py")), folder / "layout.py", folder / "trellis.py"]
    return zlib.crc32(b"".join(path.read_bytes() for path in files))


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Turn an integer address into an untyped pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def lesser(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the smaller of two float32 numbers, neither of them NaN.

    A loop over it is made of vectors: the least of 256 takes 25 ns on an AVX2 core. numba compares
    and chooses for `min`, one number at a time whatever it is told of NaN: 83 ns.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = ir.FloatType()
        shape = ir.FunctionType(real, [real, real])
        function = builder.module.declare_intrinsic("llvm.minnum", [real], shape)
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), codegen
