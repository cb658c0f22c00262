# mypy: disable-error-code="untyped-decorator"
"""The search for the nearest codeword, compiled (called by `codebook.nearest` on a CPU with numba).

Not here: what is searched for; the plain torch search that it must agree with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgvq_kernels.cpu_jit import compile_cached

_LANES = 8
"""Codewords compared side by side; divides the size of every table."""


def nearest(vectors: Tensor, projected: Tensor, norms: Tensor) -> Tensor:
    """Return the code of the smallest `norms - 2 v . projected`, the lowest among equals.

    Up to twice as fast as torch's product and argmin, or more (medians of paired runs on one AVX2
    core, us a call: 8,192 vectors of 2 3,146 against 7,829, of 4 4,217 against 7,825; 1,536 of 8
    899 against 944; 256 of 4 151 against 193).

    Args:
        vectors: `[B, N, d]` float32, finite.
        projected: `[B, K, d]` float32: codewords times the block's metric; K a multiple of 8.
        norms: `[B, K]` float32: the codewords' forms in the metric.

    Returns:
        `[B, N]` int64.
    """
    codes = torch.empty(vectors.shape[:2], dtype=torch.int64)
    _search(
        vectors.contiguous().numpy(),
        projected.transpose(1, 2).contiguous().numpy(),
        norms.contiguous().numpy(),
        codes.numpy(),
    )
    return codes


@compile_cached
def _search(vectors, projected, norms, codes):  # type: ignore[no-untyped-def]
    """Score all codewords of a vector side by side, then look the smallest score up."""
    B, N, d = vectors.shape
    K = norms.shape[1]
    scores = norms[0].copy()
    lows = norms[0, :_LANES].copy()
    for b in range(B):
        for i in range(N):
            for k in range(K):
                scores[k] = norms[b, k]
            for j in range(d):
                pull = -2 * vectors[b, i, j]
                for k in range(K):
                    scores[k] += pull * projected[b, j, k]
            # A minimum a lane: a single running one is a chain that no compiler may cut.
            for lane in range(_LANES):
                lows[lane] = scores[lane]
            for k in range(_LANES, K, _LANES):
                for lane in range(_LANES):
                    score = scores[k + lane]
                    lows[lane] = score if score < lows[lane] else lows[lane]
            smallest = lows[0]
            for lane in range(_LANES):
                smallest = min(smallest, lows[lane])
            code = 0
            while code < K - 1 and scores[code] != smallest:
                code += 1
            codes[b, i] = code
