"""How fast this machine does each kind of `solver_work`, measured in seconds (for `forecast`).

Each kind is timed through the function that will do it, on a small problem, with the threads and on
the device of the run; the least of several times counts, so other work on the machine does not. A
whole `solve` then tells what the parts leave out. Not here: how much there is to do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import TRELLIS_WINDOWS, Band, Stage, VQLayout, rate_stages
from mgvq_quantizer import codebook, ldl, rounding, solver, solver_work, trellis_search
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.solver_work import (
    FACTOR,
    FLOW,
    FORWARD,
    MATMUL,
    PAIRS,
    REFIT,
    SPREAD,
    SQUARE,
    STEP,
    STORE,
    TRAIN,
    VISIT,
    Work,
)
from mgvq_runtime.checkpoint.files import digest

_ROWS, _COLUMNS, _RATE = 1024, 256, 2
"""The matrix that is rounded on trial."""
_FEW_ROWS = 32
"""Its rows where a trellis is searched without compiled code: 73 to 86 us a weight."""
_PAIRED_ROWS, _PAIRED_RATE = 256, 3
"""Of the matrix whose stages are chosen together."""
_FORWARD_ROWS = 512
_VECTORS = 8192
"""That are searched for on trial."""
_MOST_COLUMNS = 4096
"""Of the matrices that are multiplied and factored on trial: a few GMAC, so that a plan of a large
model takes no longer than one of a small model."""
_ENOUGH_SECONDS = 0.2
_LEAST_RUNS = 3
_ITERATIONS = 8
_REFITS = 2
_DIGESTED = 1 << 22


@dataclass(frozen=True)
class Speed:
    """Seconds a unit of each kind of work."""

    seconds: Mapping[str, float]
    """By kind; those of a rounding are scaled to what a whole `solve` takes."""
    rounding: float
    """What they were scaled by: what the parts leave out."""
    device: str
    threads: int

    def time(self, work: Work) -> float:
        """Return the seconds some work takes, of any kind."""
        return sum(n * self.seconds[kind] for kind, n in work.items())


def measure_speed(
    recipe: QuantRecipe, forward: tuple[int, int], stages: Iterable[Stage], device: str
) -> Speed:
    """Time every kind of work.

    Args:
        recipe: the solver's settings that change its speed.
        forward: `(O, I)` of a matrix of the model's blocks.
        stages: whose codes will be searched for, all of the recipe's codec.
        device: where the run will compute.
    """
    clock = _Clock(torch.device(device))
    product = _matmul(clock, forward)
    seconds = {FORWARD: product, MATMUL: product, FLOW: _flow(clock, forward)}
    data = bytes(_DIGESTED)
    seconds[STORE] = clock(lambda: digest(data)) / _DIGESTED
    tried = rate_stages(_RATE, recipe.codec, recipe.window)
    for stage in {*stages, *tried, *_quickly_swept(recipe)}:
        seconds |= _search(clock, stage)
    seconds |= _factor(clock, recipe)
    if recipe.codec == "lookup":
        seconds |= _training(clock, seconds)
    seconds |= _sweep(clock, seconds, recipe)
    if recipe.codec == "lookup":
        spent, counted = _swept(clock, _PAIRED_ROWS, seconds, rate_stages(_PAIRED_RATE))
        seconds[PAIRS] = spent / counted[PAIRS]
    seconds |= _refit(clock, seconds, tried[0])
    scale = _solve(clock, seconds, recipe)
    outside = (FLOW, FORWARD, STORE)
    seconds = {kind: s * (1.0 if kind in outside else scale) for kind, s in seconds.items()}
    return Speed(seconds, scale, device, torch.get_num_threads())


class _Clock:
    """Takes the least time of several calls, and makes their tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)
        # What one thread of this process spends is what an idle machine would take.
        is_alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._now = time.process_time if is_alone else time.perf_counter

    def __call__(self, run: Callable[[], object], least_runs: int = _LEAST_RUNS) -> float:
        times: list[float] = []
        run()  # compiles, and brings the device up to speed
        while len(times) < least_runs or (sum(times) < _ENOUGH_SECONDS and len(times) < 100):
            self._wait()
            start = self._now()
            run()
            self._wait()
            times.append(self._now() - start)
        return min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def moment(self, width: int) -> Tensor:
        """A second moment `[I, I]` float64 of uneven channels with a decaying spectrum, like those
        that the steps of a refit were counted on (`solver_work.REFIT_STEPS`)."""
        basis = torch.linalg.qr(self.randn(width, width).double())[0]
        numbers = torch.arange(1, width + 1, dtype=torch.float64, device=self.device)
        spread = torch.exp(0.7 * self.randn(width)).double()  # [I]
        return spread[:, None] * (basis * numbers**-0.8 @ basis.T) * spread


def _matmul(clock: _Clock, forward: tuple[int, int]) -> float:
    O, I = (min(n, _MOST_COLUMNS) for n in forward)  # noqa: E741
    x, weight = clock.randn(_FORWARD_ROWS, I), clock.randn(O, I)
    return clock(lambda: x @ weight.T) / (_FORWARD_ROWS * O * I)


def _flow(clock: _Clock, forward: tuple[int, int]) -> float:
    width = min(forward[1], _MOST_COLUMNS)
    x, gates, norm = clock.randn(_FORWARD_ROWS, width), clock.randn(_FORWARD_ROWS, 2 * width), 1e-6
    weight = clock.randn(width)

    def run() -> None:
        ops.add_rms_norm(x, x.clone(), weight, norm)
        ops.swiglu(gates)

    return clock(run) / (_FORWARD_ROWS * 4 * width)


def _quickly_swept(recipe: QuantRecipe) -> tuple[Stage, ...]:
    """The stages of the matrix whose sweeps are timed: a trellis's search is the least of them
    where its window is the shortest, and the rest does not depend on it."""
    return rate_stages(_RATE, recipe.codec, TRELLIS_WINDOWS[0])


def _rows(codec: str) -> int:
    """Rows of a matrix that is rounded on trial."""
    return _FEW_ROWS if codec == "trellis" and not ops.has_numba() else _ROWS


def _search(clock: _Clock, stage: Stage) -> dict[str, float]:
    """Time the search for the codes of one stage."""
    table = clock.randn(stage.codebook_size, stage.vector_dim)
    if stage.codec == "trellis":
        rows = _rows(stage.codec)
        goal, even = clock.randn(rows, 8), torch.ones(8, device=clock.device)
        spent = clock(lambda: trellis_search.encode(goal, even, table, stage.rate))
        (count,) = solver_work.encode(rows, stage).values()
        return {solver_work.path(stage): spent / count}
    d = stage.vector_dim
    vectors, eye = clock.randn(1, _VECTORS, d), torch.eye(d, device=clock.device)[None]
    spent = clock(lambda: codebook.nearest(vectors, table, eye))
    return {solver_work.search(d): spent / (_VECTORS * stage.codebook_size * d)}


def _factor(clock: _Clock, recipe: QuantRecipe) -> dict[str, float]:
    width = 4 * _COLUMNS
    moment = ldl.damp(clock.moment(width), 0.01)
    layout = VQLayout.uniform(_ROWS, width, _RATE, codec=recipe.codec)
    runs = rounding.blocks_of(layout)
    alone = clock(lambda: torch.linalg.cholesky(moment))

    def both() -> None:
        factors = ldl.factorize(moment, runs, 0.01)
        rounding.ldl_feedback(factors)
        rounding.descent_feedback(factors)

    rest = max(0.0, clock(both) - alone)
    return {FACTOR: alone / (width**3 // 6), SQUARE: rest / width**2}


def _training(clock: _Clock, seconds: Mapping[str, float]) -> dict[str, float]:
    d = 8 // _RATE
    vectors = clock.randn(64, 512, d)
    metrics = torch.eye(d, device=clock.device).expand(64, d, d).contiguous()

    def run(iterations: int) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        return lambda: codebook.train_codebook(vectors, metrics, iterations, generator)

    def rest(iterations: int, unit: str, spent: float) -> float:
        counted = solver_work.train_codebook(64 * 512, 64, d, iterations)
        count = counted.pop(unit)
        known = sum(n * seconds.get(kind, 0.0) for kind, n in counted.items())
        return max(0.0, spent - known) / count

    first = clock(run(0))
    spread = rest(0, SPREAD, first)
    return {SPREAD: spread, TRAIN: rest(_ITERATIONS, TRAIN, clock(run(_ITERATIONS)) - first)}


def _sweep(clock: _Clock, seconds: Mapping[str, float], recipe: QuantRecipe) -> dict[str, float]:
    few, many = (
        _swept(clock, rows, seconds, _quickly_swept(recipe)) for rows in (8, _rows(recipe.codec))
    )
    visited = few[1][VISIT], many[1][VISIT]
    visit = max(0.0, many[0] - few[0]) / (visited[1] - visited[0])
    return {VISIT: visit, STEP: max(0.0, few[0] - visited[0] * visit) / few[1][STEP]}


def _swept(
    clock: _Clock, rows: int, seconds: Mapping[str, float], stages: tuple[Stage, ...]
) -> tuple[float, Work]:
    """Seconds of a sweep beyond its products and searches, and what it has to do."""
    layout = VQLayout(rows, _COLUMNS, (Band(0, _COLUMNS, stages),))
    factors = ldl.factorize(clock.moment(_COLUMNS), rounding.blocks_of(layout), 0.01)
    feedback, rates = rounding.ldl_feedback(factors), trellis_search.trellis_rates(layout)
    tables = [[clock.randn(stage.codebook_size, stage.vector_dim) for stage in stages]]
    weight = clock.randn(rows, _COLUMNS)
    state = rounding.empty(weight, tables, [_COLUMNS])
    spent = clock(
        lambda: rounding.sweep(weight, state, tables, feedback, keep_better=True, rates=rates)
    )
    counted = solver_work.sweep(layout, keeps_better=True)
    known = sum(n * seconds.get(kind, 0.0) for kind, n in counted.items())
    return max(0.0, spent - known), counted


def _refit(clock: _Clock, seconds: Mapping[str, float], stage: Stage) -> dict[str, float]:
    d, size, passes = stage.vector_dim, stage.codebook_size, 1 + _REFITS
    weight, moment = clock.randn(_ROWS, _COLUMNS), clock.moment(_COLUMNS).float()
    codes = torch.randint(size, (_ROWS, _COLUMNS // d), generator=clock.generator)
    codes = codes.to(clock.device)
    tables = {"0": clock.randn(size, d)}
    spent = clock(
        lambda: codebook.refit_codebooks(
            [weight], [moment], [[[codes]]], [[["0"]]], tables, _REFITS, settled=0.0
        )
    )
    known = passes * _ROWS * _COLUMNS**2 * seconds[MATMUL]
    return {REFIT: max(0.0, spent - known) / (passes * codes.numel())}


def _solve(clock: _Clock, seconds: Mapping[str, float], recipe: QuantRecipe) -> float:
    """Time a whole solve, shortened to a round, and return it as a share of its parts."""
    short = dataclasses.replace(
        recipe,
        refit_rounds=1,
        descent_sweeps=1,
        draw_out=0.0,
        codebook_iterations=_ITERATIONS,
    )
    rows, stages = _rows(recipe.codec), rate_stages(_RATE, recipe.codec, recipe.window)
    layout = VQLayout(rows, _COLUMNS, (Band(0, _COLUMNS, stages),))
    problem = solver.Problem(clock.randn(rows, _COLUMNS), clock.moment(_COLUMNS), None, layout)
    spent = clock(lambda: solver.solve([problem], short, torch.Generator().manual_seed(0)), 2)
    counted = solver_work.solve([layout], short)
    return spent / sum(n * seconds[kind] for kind, n in counted.items())
