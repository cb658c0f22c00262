"""Which compilers of kernels are installed (called by `ops` and `dense_ops`).

Looks for the packages without importing them.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

logger = logging.getLogger(__name__)


@functools.cache
def has_numba() -> bool:
    """Say whether the cpu kernels can be compiled; logs the fallback once if they cannot."""
    found = importlib.util.find_spec("numba") is not None
    if not found:
        logger.warning(
            "numba is not installed: quantized layers on the CPU decode their weights at every "
            "call, which is slow (install the 'cpu' extra)"
        )
    return found


@functools.cache
def has_triton() -> bool:
    """Say whether the GPU kernels can be compiled; logs the fallback once if they cannot."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed: quantized layers on the GPU run plain torch ops")
    return found
