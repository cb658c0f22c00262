"""What flows into a module during calibration: recorded calls and second moments (for `pipeline`).

Forward hooks on our own models; a run is cut short as soon as it has passed the module that is
looked at. Not here: the calibration data itself (`calibration`), what is done with a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgvq_quantizer.calibration import CalibrationError

Run = Callable[[], object]
"""One forward over one calibration batch."""


class _Seen(Exception):
    """Raised by a hook to end a run that has nothing more to show."""


def record_calls(module: nn.Module, runs: Iterable[Run]) -> list[tuple[Any, ...]]:
    """Return the positional arguments `module` is called with, one tuple a run.

    Args:
        module: a module that every run calls once, without keyword arguments.
        runs: forwards; each ends when it reaches the module.
    """
    calls: list[tuple[Any, ...]] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args)
        raise _Seen

    _run_with_hook(module, hook, runs)
    return calls


def input_moment(name: str, module: nn.Module, runs: Iterable[Run]) -> Tensor:
    """Return the mean of `x x^T` over all rows that enter a module.

    Args:
        name: what the module is called in messages.
        module: its first positional argument is `[..., I]`.
        runs: forwards; each ends when it reaches the module.

    Returns:
        `[I, I]` float64.

    Raises:
        CalibrationError: if nothing entered the module, or something not finite.
    """
    total: Tensor | None = None
    rows = 0

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, rows
        x = args[0].reshape(-1, args[0].shape[-1]).float()  # [T, I]
        product = (x.T @ x).double()
        total = product if total is None else total + product
        rows += x.shape[0]
        raise _Seen

    _run_with_hook(module, hook, runs)
    if total is None or rows == 0:
        raise CalibrationError(
            f"the calibration data never reaches {name}: does it hold pictures and text?"
        )
    if not bool(torch.isfinite(total).all()):
        raise CalibrationError(
            f"the activations that enter {name} are not finite: check the unquantized model with "
            "mgvq-eval, or try other calibration data"
        )
    return total / rows


def input_moments(modules: Mapping[str, nn.Module], runs: Sequence[Run]) -> dict[str, Tensor]:
    """Return `input_moment` of several modules by name."""
    return {name: input_moment(name, module, runs) for name, module in modules.items()}


def _run_with_hook(
    module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None], runs: Iterable[Run]
) -> None:
    handle = module.register_forward_pre_hook(hook)
    try:
        for run in runs:
            try:
                run()
            except _Seen:
                continue
    finally:
        handle.remove()
