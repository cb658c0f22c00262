"""What a case of an op is, and how far its result may be from the float64 truth.

Called by the tables of cases (`vq_cases`, `dense_cases`) and by the steps that run them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.place import Place

TOLERANCES = {
    "gemv": {torch.float16: 3e-4, torch.bfloat16: 3e-3},
    "int8 x": {torch.float16: 1.5e-2, torch.bfloat16: 1.5e-2},
    "gemm": {torch.float16: 1e-3, torch.bfloat16: 5e-3},
    "attention": {torch.float16: 2e-3, torch.bfloat16: 1e-2},
}
"""Relative L2 error allowed, by kind of kernel and dtype."""

ULPS = 1.0
"""Units in the last place allowed where arithmetic is float32 and one cast ends it."""


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One call of an op with its truth."""

    variant: str
    """Entry point, dtype and shape, in words."""
    run: Callable[[], Any]
    """Gives a tensor or a tuple of tensors; may be called again and again."""
    truth: Callable[[], Any]
    """The same in float64, on the CPU; for `metric` "bits" the exact tensors."""
    tolerance: float
    metric: str = "relative"
    """"relative" (L2), "ulps" (of the output's dtype, the worst element) or "bits"."""
    nbytes: int = 0
    """Bytes a call must move; 0: not timed."""


Cases = Callable[[Place, bool], Iterator[OpCase]]
"""Makes the cases of one op at a place: the small ones, or (True) the one of a real model."""


def measure_error(case: OpCase) -> float:
    """Run a case and measure how far its worst output is from the truth; NaN counts as infinite."""
    found, expected = case.run(), case.truth()
    pairs = zip(_tuple(found), _tuple(expected), strict=True)
    errors = [_error(case.metric, y.cpu(), truth.cpu()) for y, truth in pairs]
    return max(float("inf") if error != error else error for error in errors)


def ulps(y: Tensor, truth: Tensor) -> float:
    """Measure the worst error in units in the last place of y's dtype.

    Near zero, where float32 sums cancel, the unit is that of a thousandth of the mean size.
    """
    truth = truth.double()
    floor = truth.square().mean().sqrt() * 1e-3
    exponent = truth.abs().clamp(min=float(floor) or 1e-30).log2().floor()
    unit = torch.finfo(y.dtype).eps * torch.exp2(exponent)
    return float(((y.double() - truth).abs() / unit).max())


def _error(metric: str, y: Tensor, truth: Tensor) -> float:
    if y.shape != truth.shape:
        raise ValueError(f"the op gave {list(y.shape)}, its truth is {list(truth.shape)}")
    if metric == "bits":
        if y.dtype != truth.dtype:
            raise TypeError(f"the op gave {y.dtype}, its truth is {truth.dtype}")
        return float((y != truth).sum())
    if metric == "ulps":
        return ulps(y, truth)
    return float((y.double() - truth).norm() / truth.norm())


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
