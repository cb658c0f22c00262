"""What flows into a module during calibration: recorded calls and second moments.

Called by `stream` and `sensitivity`. Forward hooks on our own models; a run that looks at one
module is cut short as soon as it has passed it. Not here: the calibration data (`calibration`), how
much each token counts (`token_weights`), what is done with a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgvq_quantizer.calibration import CalibrationError

Run = Callable[[], object]
"""One forward over one calibration batch."""
Calls = list[tuple[Any, ...]]
"""Arguments of a module, one tuple a run."""


class _Seen(Exception):
    """Raised by a hook to end a run that has nothing more to show."""


class Products:
    """The weighted mean of `a b^T` over rows, run after run."""

    def __init__(self, weights: Sequence[Tensor] | None) -> None:
        """Start at nothing.

        Args:
            weights: how much each row counts, one `[T]` a run; None counts all alike.
        """
        self._weights = weights
        self._total: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.float64)
        self._run = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the rows `[T, A]` and `[T, B]` of the next run."""
        if self._weights is None:
            self._count += len(a)
        else:
            weight = self._weights[self._run].to(a)  # [T]
            a = a * weight[:, None]
            self._count += float(weight.double().sum())
        product = (a.T @ b).double()
        self._total = product if self._total is None else self._total + product
        self._run += 1

    def mean(self) -> Tensor | None:
        """Return the mean `[A, B]` float64; None where no row counts."""
        if self._total is None or not float(self._count):
            return None
        return self._total / float(self._count)


def rows_of(x: Tensor) -> Tensor:
    """Return what enters a linear layer as `[T, I]` float32."""
    return x.reshape(-1, x.shape[-1]).float()


def checked_moment(name: str, moment: Tensor | None) -> Tensor:
    """Return a mean of products with a matrix's inputs, as `Products` found it.

    Raises:
        CalibrationError: if nothing entered the matrix, or something not finite.
    """
    if moment is None:
        raise CalibrationError(
            f"the calibration data never reaches {name}: does it hold pictures and text?"
        )
    if not bool(torch.isfinite(moment).all()):
        raise CalibrationError(
            f"the activations that enter {name} are not finite: check the unquantized model with "
            "mgvq-eval, or try other calibration data"
        )
    return moment


@contextmanager
def rounding_of(name: str) -> Iterator[None]:
    """Let numbers that fail inside say whose they are: a matrix's, or those of all of a kind.

    Raises:
        CalibrationError: for an `ArithmeticError`.
    """
    try:
        yield
    except ArithmeticError as error:
        raise CalibrationError(f"{name} cannot be rounded: {error}") from error


def record_calls(module: nn.Module, runs: Iterable[Run]) -> Calls:
    """Return the positional arguments `module` is called with, one tuple a run.

    Args:
        module: a module that every run calls once, without keyword arguments.
        runs: forwards; each ends when it reaches the module.
    """
    calls: Calls = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args)
        raise _Seen

    _run_with_hooks({module: hook}, runs)
    return calls


def next_call(call: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
    """Put a block's output in the place of what it was called with first: the next one's call."""
    state = output if isinstance(output, tuple) else (output,)
    return (*state, *call[len(state) :])


def input_moment(
    name: str, module: nn.Module, runs: Iterable[Run], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the mean of `x x^T` over all rows that enter a module.

    Args:
        name: what the module is called in messages.
        module: its first positional argument is `[..., I]`.
        runs: forwards; each ends when it reaches the module.
        weights: how much each row counts, one `[T]` a run; None counts all alike.

    Returns:
        `[I, I]` float64.

    Raises:
        CalibrationError: if nothing entered the module, or something not finite.
    """
    total = Products(weights)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = rows_of(args[0])
        total.add(x, x)
        raise _Seen

    _run_with_hooks({module: hook}, runs)
    return checked_moment(name, total.mean())


def input_mean(
    name: str, module: nn.Module, runs: Iterable[Run], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the mean over all rows that enter a module; see `input_moment`.

    Returns:
        `[I]` float64.
    """
    total, count, run = torch.zeros((), dtype=torch.float64), 0.0, 0

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, count, run
        x = args[0].reshape(-1, args[0].shape[-1])  # [T, I]
        weight = torch.ones(len(x)) if weights is None else weights[run]
        weight = weight.to(x.device).double()
        total = total.to(x.device) + weight @ x.double()
        count += float(weight.sum())
        run += 1
        raise _Seen

    _run_with_hooks({module: hook}, runs)
    if not count:
        raise CalibrationError(f"the calibration data never reaches {name}")
    return total / count


def input_moments(
    modules: Mapping[str, nn.Module],
    runs: Iterable[Run],
    weights: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return `input_moment` of several modules by name, all from the same whole runs.

    A module without weights counts all rows alike; those of one with weights are for the runs that
    reach it, in order.
    """
    sums = {name: Products((weights or {}).get(name)) for name in modules}
    watch_inputs(modules, runs, lambda name, x: sums[name].add(x, x))
    return {name: checked_moment(name, total.mean()) for name, total in sums.items()}


def input_energies(
    modules: Mapping[str, nn.Module],
    runs: Iterable[Run],
    weights: Mapping[str, Sequence[Tensor]],
) -> dict[str, Tensor]:
    """Return the sums of `x^2` of every channel of several modules, weighted in several ways.

    Args:
        modules: by name; the first positional argument of each is `[..., I]`.
        runs: whole forwards.
        weights: `[K, T]` a run: how much each row counts, in `K` ways.

    Returns:
        `[K, I]` float64 by name.
    """
    totals: dict[str, list[Tensor]] = {name: [] for name in modules}

    def add(name: str, x: Tensor) -> None:
        weight = weights[name][len(totals[name])].to(x)  # [K, T]
        totals[name].append((weight @ x.square()).double())

    watch_inputs(modules, runs, add)
    return {name: torch.stack(parts).sum(0) for name, parts in totals.items()}


def watch_inputs(
    modules: Mapping[str, nn.Module], runs: Iterable[Run], take: Callable[[str, Tensor], None]
) -> None:
    """Call `take` with a module's name and the rows `[T, I]` that enter it, in every run.

    Args:
        modules: by name; the first positional argument of each is `[..., I]`.
        runs: whole forwards.
        take: what to do with the rows.
    """

    def taker(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: take(name, rows_of(args[0]))

    _run_with_hooks({module: taker(name) for name, module in modules.items()}, runs)


def _run_with_hooks(
    hooks: Mapping[nn.Module, Callable[[nn.Module, tuple[Any, ...]], None]], runs: Iterable[Run]
) -> None:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for run in runs:
            try:
                run()
            except _Seen:
                continue
