"""The work that is counted for a rounding, against the products torch really does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mgvq_kernels.layout import Band, Stage, VQLayout, rate_stages
from mgvq_quantizer import codebook, rounding, solver, solver_work, trellis_search
from mgvq_quantizer.ordering import channel_order
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.shared_books import books_of
from mgvq_quantizer.solver import Problem, solve
from mgvq_quantizer.solver_work import SPREAD, TRAIN
from mgvq_quantizer.trellis_search import COMMON_TAIL, first_table

RECIPE = QuantRecipe(bits=2, allocation="uniform", refit_rounds=2, codebook_iterations=3)
TRELLIS = dataclasses.replace(RECIPE, codec="trellis", window=8, refit_rounds=1, descent_sweeps=1)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of every product that torch does."""

    macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:
            self.macs += args[1].shape.numel() * args[2].shape[1]
        elif packet is torch.ops.aten.mv:
            self.macs += args[0].numel()
        elif packet is torch.ops.aten.linalg_cholesky_ex:
            self.macs += args[0].shape[-1] ** 3 // 6
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.macs += 2 * args[0].numel() * args[1].shape[-2]
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.macs += 5 * args[1].numel() * args[2].shape[-2]  # scores are computed again
        elif packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        return out


def real_macs(run: Callable[[], object]) -> int:
    with Products() as products:
        run()
    return products.macs


def layout_of(rows: int, bands: list[tuple[int, int]], recipe: QuantRecipe = RECIPE) -> VQLayout:
    cut, start = [], 0
    for rate, width in bands:
        cut.append(Band(start, width, rate_stages(rate, recipe.codec, recipe.window)))
        start += width
    return VQLayout(rows, start, tuple(cut), has_permutation=True)


@pytest.fixture(autouse=True)
def plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled search does the same work out of the counter's sight."""
    monkeypatch.setattr(codebook.ops, "has_numba", lambda: False)


def never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every refit take three steps, and count on them."""
    refit = partial(codebook.refit_codebooks, iterations=3, settled=0.0)
    monkeypatch.setattr(solver, "refit_codebooks", refit)
    monkeypatch.setattr(solver_work, "refit_steps", lambda *_: 3)


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("is_two_sided", [False, True])
@pytest.mark.parametrize("bands", [[(2, 96)], [(3, 32), (1, 32), (4, 32)]])
def test_a_rounding_does_the_work_that_is_counted(
    bands: list[tuple[int, int]],
    is_two_sided: bool,
    is_fixed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_settle(monkeypatch)
    g = torch.Generator().manual_seed(0)
    layout = layout_of(144, bands)
    X = torch.randn(256, 96, generator=g) * torch.arange(1, 97) ** -1.0
    X = X @ torch.randn(96, 96, generator=g)
    B = torch.eye(144, dtype=torch.float64) + 0.1 if is_two_sided else None
    weight, moment = torch.randn(144, 96, generator=g), (X.T @ X).double()
    problem = Problem(weight, moment, torch.arange(96), layout, output_factor=B)
    books = books_of(problem, solve([problem], RECIPE, g)[0]) if is_fixed else None
    real = real_macs(lambda: solve([problem], RECIPE, g, books))
    counted = solver_work.macs(solver_work.solve([layout], RECIPE, is_fixed, is_two_sided))
    assert counted == pytest.approx(real, rel=0.08 if is_two_sided else 0.02)


class Paths:
    """Counts the states that a search for a trellis would look at, by kind of work; what it finds
    is drawn, as the count does not depend on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real: Counter[str] = Counter()
        self.generator = torch.Generator().manual_seed(0)
        monkeypatch.setattr(trellis_search, "_search", self._search)

    def _search(
        self, stream: torch.Tensor, costs: object, table: torch.Tensor, rate: int, *ends: object
    ) -> torch.Tensor:
        stage = Stage(1, "trellis", rate, len(table).bit_length() - 1)
        self.real[solver_work.path(stage)] += len(stream) * len(table)
        return torch.randint(len(table), stream.shape, generator=self.generator)


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize(("rows", "bands"), [(11, [(1, 32), (3, 8)]), (515, [(2, 8)])])
def test_a_trellis_is_searched_as_often_as_is_counted(
    rows: int, bands: list[tuple[int, int]], is_fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments, of which plain codewords take one; a stream shorter than what closes it."""
    never_settle(monkeypatch)
    g = torch.Generator().manual_seed(0)
    layout = layout_of(rows, bands, TRELLIS)
    I = layout.in_features  # noqa: E741
    X = torch.randn(256, I, generator=g) @ torch.randn(I, I, generator=g)
    weight, moment = torch.randn(rows, I, generator=g), (X.T @ X).double()
    problem = Problem(weight, moment, torch.arange(I), layout)
    fixed = {f"{b}.0": first_table(rate, 8, COMMON_TAIL, g) for b, (rate, _) in enumerate(bands)}
    books = fixed if is_fixed else None
    paths = Paths(monkeypatch)
    real = real_macs(lambda: solve([problem], TRELLIS, g, books))
    counted = solver_work.solve([layout], TRELLIS, is_fixed)
    searched = sum(paths.real.values())
    assert {kind: n for kind, n in counted.items() if "search" in kind} == paths.real
    assert solver_work.macs(counted) - searched == pytest.approx(real, rel=0.02)
    assert not {TRAIN, SPREAD} & counted.keys()


@pytest.mark.parametrize("bands", [[(2, 32)], [(3, 32), (1, 32)]])
@pytest.mark.parametrize("recipe", [RECIPE, TRELLIS])
def test_entries_are_counted(recipe: QuantRecipe, bands: list[tuple[int, int]]) -> None:
    layout = layout_of(6, bands, recipe)
    stages = [band.stages for band in layout.bands]
    tables = [[torch.zeros(s.codebook_size, s.vector_dim) for s in band] for band in stages]
    state = rounding.empty(torch.zeros(6, layout.in_features), tables, [w for _, w in bands])
    named = sum(code.numel() for band in state.codes for code in band)
    assert solver_work.entries(layout) == named


@pytest.mark.parametrize(
    ("rate", "codec", "window"),
    [
        *((rate, "lookup", 12) for rate in (1, 2, 3, 4, 8)),
        *((2, "trellis", window) for window in (8, 10, 12)),
    ],
)
def test_refits_take_about_the_steps_that_are_expected(
    rate: int,
    codec: str,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
    correlated: Callable[[int, int], torch.Tensor],
) -> None:
    images, passes = codebook._images, []

    def counted(*args: Any) -> Any:
        passes.append(1)
        return images(*args)

    monkeypatch.undo()  # steps are those of the compiled search, too
    monkeypatch.setattr(codebook, "_images", counted)
    g = torch.Generator().manual_seed(0)
    layout = VQLayout.uniform(256, 256, rate, codec=codec, window=window)
    problem = Problem(torch.randn(256, 256, generator=g), correlated(256, 1), None, layout)
    solve([problem], dataclasses.replace(RECIPE, refit_rounds=1, descent_sweeps=0), g)
    expected = 1 + solver_work.refit_steps(layout)
    assert len(passes) == pytest.approx(expected, rel=0.35)


def test_trials_of_an_order_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    never_settle(monkeypatch)
    g = torch.Generator().manual_seed(0)
    layout = layout_of(600, [(2, 64), (1, 64)])
    X = torch.randn(256, 128, generator=g) * torch.arange(1, 129) ** -1.0
    X = X @ torch.randn(128, 128, generator=g)
    weight, moment = torch.randn(600, 128, generator=g), (X.T @ X).double()
    real = real_macs(lambda: channel_order(weight, moment, layout, RECIPE, g))
    counted = solver_work.macs(solver_work.channel_order(layout, RECIPE))
    assert counted == pytest.approx(real, rel=0.02)
    assert not solver_work.channel_order(layout_of(600, [(8, 128)]), RECIPE)


def test_trials_of_a_trellis_s_order_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    never_settle(monkeypatch)
    g = torch.Generator().manual_seed(0)
    layout = layout_of(600, [(2, 8)], TRELLIS)
    paths = Paths(monkeypatch)
    weight, moment = torch.randn(600, 8, generator=g), torch.eye(8, dtype=torch.float64)
    real = real_macs(lambda: channel_order(weight, moment, layout, TRELLIS, g))
    counted = solver_work.channel_order(layout, TRELLIS)
    assert {kind: n for kind, n in counted.items() if "search" in kind} == paths.real
    assert solver_work.macs(counted) == pytest.approx(real + paths.real.total(), rel=0.02)
