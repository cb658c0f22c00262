"""Trellis codes: known distortions, optimal paths, one matrix, tuning, the whole pipeline."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from mgvq_kernels import ops
from mgvq_kernels.layout import TRELLIS_RATES, Band, VQLayout, rate_stages
from mgvq_kernels.trellis import pack_windows, windows
from mgvq_quantizer import allocation, solver, trellis_search
from mgvq_quantizer.codebook import decode, entries_of
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.rounding import kept_shares
from mgvq_quantizer.solver import Problem, solve
from mgvq_quantizer.trellis_search import (
    COMMON_TAIL,
    TAILS,
    encode,
    first_table,
    tail_of,
    tails_of,
)
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ConfigError
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents

Moment = Callable[[int, int], torch.Tensor]
RECIPE = QuantRecipe(codec="trellis", window=10, refit_rounds=2, descent_sweeps=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Method memo E.1: a trellis of 12 bits with a random Gaussian table; at 5 bits what this one gave.
@pytest.mark.parametrize(
    ("rate", "known"), [(1, 0.2803), (2, 0.0733), (3, 0.0198), (4, 0.0055), (5, 0.0014)]
)
def test_the_distortion_of_a_gaussian_is_the_known_one(rate: int, known: float) -> None:
    goal = torch.randn(512, 8, generator=seeded(0))
    table = first_table(rate, 12, COMMON_TAIL, seeded(1)).values
    entries = encode(goal, torch.ones(8), table, rate)
    error = float((goal - table[:, 0][entries]).square().mean())
    assert error == pytest.approx(known, rel=0.06)


@pytest.mark.parametrize("far", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rate", "lost"), [(1, 0.28), (2, 0.0733), (3, 0.0198)])
def test_drawn_out_entries_are_the_value_on_average_and_lose_more(
    rate: int, lost: float, far: float
) -> None:
    goal = torch.randn(512, 8, generator=seeded(0))
    (kept,) = kept_shares(VQLayout.uniform(512, 8, rate, codec="trellis"), far)
    table = first_table(rate, 12, COMMON_TAIL, seeded(1)).drawn_out(1 / kept).values
    value = table[:, 0][encode(goal / kept, torch.ones(8), table, rate)]
    slope = float((goal * value).sum() / goal.square().sum())
    error = float((goal - value).square().mean())
    share = 1 - 4.0**-rate  # what the least squares keep
    assert slope == pytest.approx(share ** (1 - far), abs=0.02)
    assert error == pytest.approx(lost + share * (share**-far - 1) ** 2, rel=0.06)


@pytest.mark.parametrize("rate", [1, 2, 4])
def test_a_table_without_tails_is_a_normal_one_drawn_out(rate: int) -> None:
    # A normal density to the power p is that of a deviation p^-0.5 times as large.
    known = NormalDist(0.0, ((1 - 4.0**-rate) / 0.8) ** 0.5)
    book = first_table(rate, 10, 0, seeded(1))
    places = torch.tensor([known.inv_cdf((i + 0.5) / 1024) for i in range(1024)])
    found = book.values[:, 0].sort().values
    assert float((found - places).abs().max()) < 0.5 * book.scale + 0.02
    assert not torch.equal(found, book.values[:, 0])


def test_the_tail_of_columns_is_found_loud_ones_counting_most() -> None:
    g = seeded(2)
    spreads = torch.tensor(TAILS)[:, None, None]
    scales = torch.exp(spreads * torch.randn(len(TAILS), 2000, 40, generator=g))
    columns = scales * torch.randn(len(TAILS), 2000, 40, generator=g)
    assert [tail_of(part, torch.ones(40)) for part in columns] == list(range(len(TAILS)))
    both = torch.cat([columns[0], columns[-1]], dim=1)
    loud = torch.cat([torch.ones(40), torch.full((40,), 1e6)])
    assert tail_of(both, loud) == len(TAILS) - 1
    assert tail_of(both, loud.flip(0)) == 0


def test_every_band_has_a_tail_of_its_own() -> None:
    heavy = torch.randn(600, 32, generator=seeded(3)) * torch.exp(
        0.5 * torch.randn(600, 32, generator=seeded(4))
    )
    weight = torch.cat([torch.randn(600, 32, generator=seeded(5)), heavy], dim=1)
    bands = (Band(0, 32, rate_stages(2, "trellis")), Band(32, 32, rate_stages(3, "trellis")))
    layout, order = VQLayout(600, 64, bands, True), torch.arange(64)
    light, loud = tails_of(weight, torch.eye(64), order, layout)
    assert light < loud
    assert tails_of(weight, torch.eye(64), order.flip(0), layout) == (loud, light)


def test_a_row_with_one_loud_weight_gets_a_scale_that_reaches_it(
    correlated: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 512, generator=seeded(6))
    weight[5, 511] = 60.0
    moment = correlated(512, 9)
    moment[511, 511] += 1000 * moment.diagonal().mean()
    case = Problem(
        weight, moment, torch.arange(512), VQLayout.uniform(64, 512, 3, True, codec="trellis")
    )
    table = {"0.0": first_table(3, 12, COMMON_TAIL, seeded(1))}
    recipe = QuantRecipe(codec="trellis", refit_rounds=1, descent_sweeps=0)
    with_reach = solve([case], recipe, seeded(0), table)[0]
    monkeypatch.setattr(solver, "reaching_scales", lambda weight, scales, *rest: scales)
    without = solve([case], recipe, seeded(0), table)[0]
    assert with_reach.error < 0.2 * without.error
    ratio = with_reach.weight.scales.float() / without.weight.scales.float()
    assert ratio.argmax() == 5
    others = torch.arange(64) != 5
    assert float(ratio[others].median()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("rate", TRELLIS_RATES)
@pytest.mark.parametrize("rows", [2, 5, 300, 515])
def test_windows_follow_each_other_and_come_back_from_bytes(rows: int, rate: int) -> None:
    goal = torch.randn(rows, 8, generator=seeded(rows))
    entries = encode(goal, torch.ones(8), first_table(rate, 8, COMMON_TAIL, seeded(1)).values, rate)
    assert torch.equal(windows(pack_windows(entries, rate), rate, 8), entries)


@pytest.mark.parametrize("rate", [1, 2])
def test_a_path_between_two_states_is_the_best_of_all(rate: int) -> None:
    window, n = 4, 5
    table = torch.randn(1 << window, generator=seeded(0))
    stream, costs = torch.randn(n, generator=seeded(1)), torch.rand(n, generator=seeded(2)) + 0.5
    followers = (1 << window) >> rate
    start = torch.full((1 << window,), torch.inf)
    start.view(-1, followers)[:, 1] = 0.0
    found = trellis_search._search(stream, costs, table, rate, start, 1)
    best = torch.inf
    for symbols in itertools.product(range(1 << rate), repeat=n):
        state, path = 1, []
        for symbol in symbols:
            path.append((state % followers << rate) | symbol)
            state = path[-1]
        if state % followers == 1:
            best = min(best, float((costs * (stream - table[path]) ** 2).sum()))
    assert float((costs * (stream - table[found]) ** 2).sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("rate", TRELLIS_RATES)
def test_compiled_and_plain_searches_find_paths_of_one_cost(
    rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal, weights = (
        torch.randn(40, 8, generator=seeded(3)),
        torch.rand(8, generator=seeded(4)) + 0.1,
    )
    table = first_table(rate, 8, COMMON_TAIL, seeded(5)).values
    costs = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(ops, "has_numba", lambda: False)
        entries = encode(goal, weights, table, rate)
        costs.append(float((weights * (goal - table[:, 0][entries]) ** 2).sum()))
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


def test_a_disk_keeps_the_compiled_search(tmp_path: Path) -> None:
    """Or each process compiles it again, for seconds a rate, and leaves a file behind."""
    pytest.importorskip("numba", reason="the search is compiled by numba")
    program = (
        "import torch\n"
        "from mgvq_quantizer import cpu_trellis, trellis_search\n"
        "trellis_search.encode(torch.ones(8, 8), torch.ones(8), torch.ones(256, 1), 2)\n"
        "print(sum(cpu_trellis._coder(2).stats.cache_hits.values()))\n"
    )
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", program]
    runs = [
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [[b"0"], [b"1"]]


@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_a_matrix_loses_less_than_with_lookups(correlated: Moment, rate: int) -> None:
    weight = 0.02 * torch.randn(512, 64, generator=seeded(6))
    errors = {}
    for codec in ("lookup", "trellis"):
        layout = VQLayout.uniform(512, 64, rate, True, codec=codec)
        case = Problem(weight, correlated(64, 6), torch.arange(64), layout)
        solution = solve([case], RECIPE, seeded(7))[0]
        errors[codec] = solution.error
    dense = ops.vq_dequantize(solution.weight)
    entries = entries_of(solution.weight)
    book, unit = solution.weight.codebooks[0][0], solution.weight.codebook_scales[0][0]
    rebuilt = decode(entries, [[book.float() * unit]]) * solution.weight.scales.float()[:, None]
    assert torch.allclose(dense, rebuilt, rtol=1e-5, atol=1e-7)
    assert errors["trellis"] < 0.9 * errors["lookup"]
    assert solution.error < 0.7 * solution.error_nearest


def test_descent_never_raises_the_loss(correlated: Moment) -> None:
    weight = 0.02 * torch.randn(300, 64, generator=seeded(8))
    case = Problem(
        weight,
        correlated(64, 8),
        torch.randperm(64, generator=seeded(8)),
        VQLayout.uniform(300, 64, 2, True, codec="trellis", window=8),
    )
    errors = [
        solve([case], QuantRecipe(codec="trellis", refit_rounds=1, descent_sweeps=n), seeded(1))[0]
        for n in (0, 1, 2)
    ]
    assert errors[1].error < errors[0].error
    assert errors[2].error <= errors[1].error


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trellis") / "checkpoint"
    recipe = QuantRecipe(**{**QUICK, "codec": "trellis", "window": 8, "embedding_bits": 3})
    report = quantize(dense, output, recipe, show_progress=False)
    assert report.kl < report.kl_rounded or report.tuning_steps_kept == 0
    return output


def test_every_matrix_of_a_checkpoint_is_a_trellis_and_it_is_written_alike_again(
    dense: Path, quantized: Path, tmp_path: Path
) -> None:
    quantization = open_checkpoint(quantized).quantization
    assert quantization is not None
    assert {matrix.layout.codec for matrix in quantization.matrices.values()} == {"trellis"}
    recipe = QuantRecipe(**{**QUICK, "codec": "trellis", "window": 8, "embedding_bits": 3})
    quantize(dense, tmp_path / "again", recipe, show_progress=False)
    assert contents(tmp_path / "again") == contents(quantized)


def test_matrices_that_choose_their_tails_find_them_again(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_TAILS_OVERHEAD", 1e9)
    recipe = QuantRecipe(**{**QUICK, "codec": "trellis", "window": 8, "max_codebook_overhead": 0.0})
    for name in ("first", "again"):
        quantize(dense, tmp_path / name, recipe, show_progress=False, shared=tmp_path / "kept")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    quantization = open_checkpoint(tmp_path / "first").quantization
    assert quantization is not None
    tables = {t for m in quantization.matrices.values() for band in m.codebooks for t in band}
    tails = {table.partition("-tail")[2] for table in tables if table is not None}
    assert len(tails) > 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"codec": "tree"}, "lookup, trellis"),
        ({"codec": "trellis", "window": 16}, "between 8 and 12"),
        ({"codec": "trellis", "embedding_bits": 8}, "embedding_bits must be one of 1, 2, 3, 4, 5"),
        ({"codec": "trellis", "bits": 5.5}, "up to 5 bits"),
        ({"codec": "trellis", "two_sided": True}, "no two_sided"),
    ],
)
def test_what_a_trellis_cannot_do_is_said(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        QuantRecipe(**settings)  # type: ignore[arg-type]
