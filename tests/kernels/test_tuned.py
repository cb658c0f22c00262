"""Tuned launches: what is read, refused and never changed; and the tuner's flow."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mgvq_kernels import dispatch, ops, tuned
from mgvq_kernels.dispatch import RowLimits
from mgvq_kernels.layout import VQLayout
from mgvq_kernels.packing import pack
from mgvq_kernels.tuned import Key, Tuned
from tests.kernels.random_weights import random_weight

pytest.importorskip("triton", reason="triton has no wheel for this platform")

import triton

from benchmarks import tune
from benchmarks.gpu_suite.place import Place, Timing
from mgvq_kernels.triton import vq_gemm, vq_gemv

CPU = torch.device("cpu")
KEY = Key("NVIDIA H100 80GB HBM3", "9.0", 132, "3.6.0", "abc")
TABLE = Tuned(RowLimits(2, 48), {"vq_gemv-d4": {"num_warps": 8, "num_stages": 2}})


@pytest.fixture(autouse=True)
def _nothing_stays_in_force() -> Iterator[None]:
    yield
    tuned.install(CPU, Tuned())


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / tuned.file_name(KEY.gpu)
    tuned.write(path, KEY, TABLE, {"vq_gemv-d4": {"default": [1.0]}})
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    assert tuned.read(path, KEY) == TABLE


def test_the_tables_that_are_shipped_are_for_these_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known answer: what a table was measured with; a trellis' kernels change nothing in it."""
    measured = {
        json.loads(path.read_text())["key"]["source"] for path in tuned.FOLDER.glob("*.json")
    }
    assert measured == {tuned.source_hash()}
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    hashes = []
    for name in ("vq_gemv.py", "trellis_gemv.py", "aot.py", "split_k.py"):
        (tmp_path / "triton" / name).write_text("1")
        hashes.append(tuned.source_hash.__wrapped__())
    assert len(set(hashes)) == 2
    assert hashes[0] == hashes[2] != hashes[3]


def test_a_table_of_anything_else_is_stale(tmp_path: Path) -> None:
    tuned.write(tmp_path / "a.json", KEY, TABLE, {})
    for field in dataclasses.fields(Key):
        value = 7 if field.name == "multiprocessors" else "other"
        with pytest.raises(ValueError, match="tune again"):
            tuned.read(tmp_path / "a.json", dataclasses.replace(KEY, **{field.name: value}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: {},
        lambda d: [],
        lambda d: d | {"rows": {"gemv": 2, "gemm": 65}},
        lambda d: d | {"rows": {"gemv": 2, "gemm": 1}},
        lambda d: d | {"rows": {"gemv": "2", "gemm": 4}},
        lambda d: d | {"rows": {"gemv": 2}, "launches": None},
        lambda d: d | {"launches": {"vq_gemv-d4": {"num_warps": 12}}},
        lambda d: d | {"launches": {"vq_gemv-d4": {"num_warps": True}}},
        lambda d: d | {"launches": {"vq_gemv-d4": {"splits": 4}}},
    ],
)
def test_a_damaged_table_is_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tuned.write(path, KEY, TABLE, {})
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"damaged|must be|may take"):
        tuned.read(path, KEY)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        tuned.read(path, KEY)


def test_a_gpu_reads_its_file_and_survives_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "key_of", lambda _: KEY)
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert tuned.load(gpu) == Tuned(), "an unknown GPU takes the defaults"
        path = tmp_path / tuned.file_name(KEY.gpu)
        tuned.write(path, KEY, TABLE, {})
        assert tuned.load(gpu) == TABLE
        assert not caplog.records
        path.write_text("{")
        assert tuned.load(gpu) == Tuned()
        assert "run python -m benchmarks.tune again" in caplog.text
        tuned.write(path, dataclasses.replace(KEY, source="older"), TABLE, {})
        assert tuned.load(gpu) == Tuned()
        assert "older" in caplog.text


def test_the_defaults_are_those_of_dispatch() -> None:
    assert Tuned().rows == RowLimits(dispatch.TRITON_GEMV_ROWS, dispatch.TRITON_GEMM_ROWS)
    assert tuned.launch_options(CPU, "vq_gemv-d4", num_warps=16) == {"num_warps": 16}


def test_row_limits_choose_the_path() -> None:
    layout, limits = VQLayout.uniform(64, 128, 2), RowLimits(2, 8)
    paths = [
        dispatch.choose_backend("vq_linear", n, layout, "cuda", False, True, limits=limits)
        for n in (2, 3, 8, 9)
    ]
    assert paths == ["triton_gemv", "triton_gemm", "triton_gemm", "triton_decode"]


def test_the_front_door_obeys_the_limits_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "choose_pack", lambda *_: "triton")
    packed = pack(random_weight(VQLayout.uniform(64, 128, 2)), "triton")
    assert ops._path("vq_linear", 5, packed) == "triton_gemm"
    tuned.install(CPU, Tuned(RowLimits(8, 16)))
    assert ops._path("vq_linear", 5, packed) == "triton_gemv"


def test_int8_takes_no_more_rows_than_it_has_counters_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was tuned: a launch of it cuts no rows, where the other GEMV does."""
    monkeypatch.setattr(ops.dispatch, "choose_pack", lambda *_: "triton")
    packed = pack(random_weight(VQLayout.uniform(64, 128, 2)), "triton")
    tuned.install(CPU, Tuned(RowLimits(8, 16)))
    steps: list[str] = []

    def take(step: str, codec: str) -> SimpleNamespace:
        steps.append(step)
        return SimpleNamespace(linear=lambda *_: None)

    monkeypatch.setattr(ops, "_triton", take)
    for rows in (4, 5):
        ops.vq_linear(torch.zeros(rows, 128).half(), packed, int8_activations=True)
    assert steps == ["gemv_int8", "gemv"]


def test_a_triton_of_any_name_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of it are called triton, pytorch-triton and more."""
    properties = SimpleNamespace(name="A GPU", major=8, minor=6, multi_processor_count=28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    key = tuned.key_of(torch.device("cuda", 0))
    assert key == Key("A GPU", "8.6", 28, triton.__version__, tuned.source_hash())


class Recorder:
    """Stands in for a compiled kernel: keeps the grid, the arguments and the options."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.calls.append(((grid, arguments[-4:]), options))


@pytest.mark.parametrize(
    ("module", "kernel", "name"),
    [(vq_gemv, "vq_gemv_kernel", "vq_gemv-d4"), (vq_gemm, "vq_gemm_kernel", "vq_gemm-d4-16")],
)
def test_tuning_changes_options_and_never_the_split(
    module: ModuleType, kernel: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches with and without a table differ in warps and stages alone."""
    recorder = Recorder()
    monkeypatch.setattr(module, kernel, recorder)
    monkeypatch.setattr(vq_gemm, "arrange_kernel", Recorder())
    monkeypatch.setattr(module, "multiprocessors", lambda _: 40)
    packed = pack(random_weight(VQLayout.uniform(520, 1024, 2)), "triton")
    x = torch.zeros(3, 1024).half()
    module.linear(x, packed, None, None)
    tuned.install(CPU, Tuned(launches={name: {"num_warps": 2, "num_stages": 5}}))
    module.linear(x, packed, None, None)
    (plain, before), (same, after) = recorder.calls
    assert plain == same, "grid, blocks and splits"
    assert plain[1][-1] > 1, "this matrix is split"
    assert after == before | {"num_warps": 2, "num_stages": 5}
    assert before["num_warps"] != 2


class ScriptedClock:
    """Says what a table of options would take on a GPU that does not exist."""

    def __init__(self, kernel: str, us: dict[str, float]) -> None:
        self.kernel, self.us = kernel, us

    def copies(self, nbytes: int) -> int:
        return 1

    def time(self, calls: Any) -> Timing:
        us = self.us[str(dict(tuned.for_device(CPU).launches[self.kernel]))]
        return Timing(us, us, us)


@pytest.mark.parametrize(("us", "kept"), [(90.0, True), (98.0, False), (110.0, False)])
def test_only_a_clear_win_is_kept(us: float, kept: bool) -> None:
    options = {"num_warps": 8}
    clock = ScriptedClock("k", {"{}": 100.0, str(options): us})
    workload = tune.Workload("k", (options,), lambda _: {"m": [[lambda: torch.ones(2)]]})
    best, measured = tune.tune_kernel(Place(CPU, clock), workload)
    assert (best == options) is kept
    assert measured["default"] == {"m": [100.0]}


def test_an_option_that_changes_a_bit_or_does_not_launch_is_turned_down() -> None:
    def call() -> torch.Tensor:
        warps = tuned.for_device(CPU).launches["k"].get("num_warps", 4)
        if warps == 16:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor(1.0 + (warps == 8) * 2**-23)

    clock = ScriptedClock(
        "k", dict.fromkeys(["{}", *map(str, ({"num_warps": 8}, {"num_warps": 16}))], 1.0)
    )
    clock.us["{}"] = 100.0
    for options, why in (
        ({"num_warps": 8}, "changes bits"),
        ({"num_warps": 16}, "out of resource"),
    ):
        workload = tune.Workload("k", (options,), lambda _: {"m": [[call]]})
        best, measured = tune.tune_kernel(Place(CPU, clock), workload)
        assert best == {}
        assert why in measured[str(options)]


def test_a_layer_is_as_slow_as_its_matrices_together() -> None:
    """Known answers: small matrices do not outvote the large one, nor one model another."""
    default = {"a": [10.0, 10.0, 100.0], "b": [10.0]}
    assert tune.gain(default, {"a": [5.0, 5.0, 120.0], "b": [1.0]}) == 0.0
    assert tune.gain(default, {"a": [10.0, 10.0, 40.0], "b": [5.0]}) == pytest.approx(2.0)


def test_limits_are_where_the_times_cross() -> None:
    """Known answer: GEMV wins to 3 rows, GEMM to 32."""
    rows = (1, 2, 3, 4, 32, 64)
    gemv = {n: 10.0 * n for n in rows}
    gemm = {n: 35.0 + n / 10 for n in rows}
    decode = dict.fromkeys(rows, 40.0)
    times = {"gemv": gemv, "gemm": gemm, "decode": decode}
    assert tune.cross(times) == RowLimits(3, 32)
    assert tune.cross(times | {"gemm": dict.fromkeys(rows, 99.0)}) == RowLimits(4, 4)
    assert tune.cross(times | {"decode": dict.fromkeys(rows, 1.0)}) == RowLimits(0, 0)


def test_few_options_a_kernel() -> None:
    for workload in tune.workloads():
        assert 1 <= len(workload.candidates) <= 6
        for options in workload.candidates:
            tuned.check(Tuned(launches={workload.kernel: options}))


def test_the_tuner_runs_interpreted(tmp_path: Path) -> None:
    """The whole flow with the kernels interpreted and the times pretended."""
    command = [sys.executable, "-m", "benchmarks.tune", "--interpret", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    key = Key("pretended", "0.0", 1, "interpreter", tuned.source_hash())
    table = tuned.read(tmp_path / "pretended.json", key)
    assert set(table.launches) == {workload.kernel for workload in tune.workloads()}
    with pytest.raises(SystemExit):
        tune.main(["--interpret"])
