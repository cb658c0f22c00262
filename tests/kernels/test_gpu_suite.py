"""`python -m benchmarks.gpu_suite`: the whole flow interpreted; what fails, hangs or is dropped."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks.gpu_suite import __main__ as gpu_suite
from benchmarks.gpu_suite import check_steps, report, sanitizer, vq_cases, worker
from benchmarks.gpu_suite.cases import OpCase, measure_error, ulps
from benchmarks.gpu_suite.peers import PEERS, AbsentError, wanted
from benchmarks.gpu_suite.place import GraphClock, NoClock, Place, find_place
from benchmarks.gpu_suite.steps import Journal, Row, Step, run_steps
from benchmarks.gpu_suite.vq_cases import LINEARS
from benchmarks.gpu_suite.weights import MIXED, TRELLIS_TINY, decode, random_weight
from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from tests.kernels.random_weights import oracle

CPU = Place(torch.device("cpu"), NoClock())


def test_every_op_has_cases() -> None:
    """A new op fails here until it is checked and timed on a GPU too."""
    assert set(check_steps.CASES) == set(ops.OPS)


def test_the_whole_suite_runs_interpreted(tmp_path: Path) -> None:
    run = suite(tmp_path, "--sanitizer")
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("gpu_suite_*.json")
    result = json.loads(path.read_text())
    assert {row["op"] for row in result["check"]} == set(ops.OPS)
    assert all(row["passed"] for row in result["check"])
    assert result["linear"]
    assert result["op"]
    assert {row["us"] for row in result["linear"] + result["op"]} == {None}, "no time of a GPU"
    assert {*PEERS} <= {row["variant"] for row in result["absent"]}
    assert not result["errors"] + result["dropped"]
    table = path.with_suffix(".md").read_text()
    assert "| paged_attention_decode | 2 of 2 |" in table
    assert "not timed" in table
    assert {left.suffix for left in tmp_path.iterdir()} == {".json", ".md"}, "no scratch is left"


def test_what_was_measured_survives_an_interrupt(tmp_path: Path) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(tmp_path), **pipes, text=True, preexec_fn=listen) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130, first + rest
    (path,) = tmp_path.glob("gpu_suite_*.json")
    result = json.loads(path.read_text())
    assert result["interrupted"]
    assert result["device"]["name"] == "Triton interpreter on a CPU"
    assert "Stopped by hand" in path.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "--interpret" in capsys.readouterr().err


def test_an_error_is_written_down_and_the_next_step_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def breaks() -> Iterator[Row]:
        yield {"kind": "op", "us": 1.0}
        raise RuntimeError("no luck")

    steps = [step("breaks", breaks), step("works", lambda: iter([{"kind": "op", "us": 2.0}]))]
    assert run_steps(steps, journal, time.time() + 60, 30, lambda: True)
    result = report.document(journal, 1, interrupted=False)
    assert [row["us"] for row in result["op"]] == [1.0, 2.0], "rows before the error are kept"
    assert result["errors"] == [{"step": "breaks", "error": "RuntimeError: no luck"}]
    assert not report.is_clean(result)


def test_a_lost_device_asks_for_a_new_process_that_goes_on_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    ran = []

    def breaks() -> Iterator[Row]:
        ran.append("breaks")
        raise RuntimeError("an illegal memory access")
        yield {}

    def works() -> Iterator[Row]:
        ran.append("works")
        yield {"kind": "op"}

    steps = [step("breaks", breaks), step("works", works)]
    assert not run_steps(steps, journal, time.time() + 60, 30, lambda: False)
    assert run_steps(steps, journal, time.time() + 60, 30, lambda: False)
    assert ran == ["breaks", "works"]


def test_the_least_important_is_dropped_and_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    steps = [
        step("later", lambda: iter([]), rank=5, expected_s=100.0),
        step("first", lambda: iter([{"kind": "op"}]), rank=0),
    ]
    assert run_steps(steps, journal, time.time() + 50, 30, lambda: True)
    result = report.document(journal, 1, interrupted=False)
    assert [(row["step"], "100 s" in row["why"]) for row in result["dropped"]] == [("later", True)]
    assert list(result["seconds"]) == ["first"]
    assert report.is_clean(result), "a budget is not a failure"


def test_a_layer_is_the_best_of_each_matrix(tmp_path: Path) -> None:
    """Known answers: 1 + 1 + 1 + 2 us, a peer with a matrix missing, 3 weights a clock."""
    journal = Journal(tmp_path / "journal")
    device = {"kind": "device", "name": "G", "multiprocessors": 2, "clocks.max.sm": "1000"}
    linears = [("qkv", "gemv", 1.0), ("o", "gemv", 1.0), ("up", "gemm", 1.0), ("down", "gemm", 2.0)]
    linears += [("down", "gemv", 3.0), ("qkv", "bf16 F.linear", 9.0)]
    shared = {"kind": "linear", "model": "M", "shape": [60, 100], "bits": 2, "rows": 1}
    for row in (device, {"kind": "copy", "gb_s": 100.0}):
        journal.write("row", "device", row=row)
    for linear, variant, us in linears:
        timing = {"us": us, "gb_s": 50.0 / us, "how": "graph"}
        row = shared | {"linear": linear, "variant": variant} | timing
        journal.write("row", "time", row=row)
    result = report.document(journal, 1, interrupted=False)
    assert result["linear"][0]["weights_per_clock_and_multiprocessor"] == 3.0
    text = "\n".join(report.markdown(result))
    assert "| M | 1 | 5.0 |  |" in text
    assert "| qkv 60x100 | 2 | gemv | 1.0 (50%) |" in text
    assert {*report.OURS, "gemv int8"} == set(LINEARS), "int8 x is on request, not ours"


def test_a_step_that_hangs_ends_its_process(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path\n"
        "from benchmarks.gpu_suite.steps import Journal, Step, run_steps\n"
        "def hangs():\n    time.sleep(60); yield {}\n"
        f"run_steps([Step('hangs', 0, 0, hangs)], Journal(Path({str(tmp_path / 'journal')!r})),"
        " time.time() + 60, 1, lambda: True)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=50)
    assert run.returncode == -signal.SIGALRM
    journal = Journal(tmp_path / "journal")
    journal.close_open_step("took too long")
    assert journal.settled() == {"hangs"}


def test_a_step_may_take_long_if_its_results_do_not(tmp_path: Path) -> None:
    def yields(rows: int) -> Iterator[Row]:
        for _ in range(rows):
            time.sleep(0.4)
            yield {}

    journal = Journal(tmp_path / "journal")
    steps = [step("long", functools.partial(yields, 4))]
    assert run_steps(steps, journal, time.time() + 60, 1, lambda: True)
    assert journal.settled() == {"long"}


def test_the_sanitized_step_is_the_one_of_its_name(tmp_path: Path) -> None:
    names = ["device", "check rope", "check rope_write_kv"]
    for arguments, asked in (
        (["--step", "check rope"], ["check rope"]),
        (["--only", "check rope"], names),
    ):
        options = worker.parse([*arguments, "--journal", str(tmp_path), "--deadline", "0"])
        assert [name for name in names if worker.is_wanted(name, options)] == asked


def test_copies_of_the_smallest_matrices_outrun_a_cache() -> None:
    """o_proj of a 2B model at 2 bits on a GPU with 72 MiB of L2."""
    assert GraphClock(72 << 20).copies(1536 * 1536 // 4) * 1536 * 1536 // 4 >= 3 * (72 << 20)


def test_the_bytes_of_a_decoding_follow_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are read and values written: 4 bytes each in float32, 2 in the halves."""
    monkeypatch.setattr(vq_cases, "layouts", lambda place, real: (TRELLIS_TINY,))
    cases = vq_cases.vq_dequantize(CPU, real=True)
    sizes = {case.variant.split()[1]: case.nbytes for case in cases if case.nbytes}
    codes = TRELLIS_TINY.code_bits() // 8
    words = {"float32": 4, **{str(dtype).removeprefix("torch."): 2 for dtype in CPU.dtypes}}
    assert sizes == {word: codes + n * TRELLIS_TINY.num_weights for word, n in words.items()}


def test_a_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(place: Place, real: bool) -> Iterator[OpCase]:
        yield OpCase("off", lambda: torch.ones(4), lambda: torch.full((4,), 1.01).double(), 1e-3)
        yield OpCase("nan", lambda: torch.full((4,), torch.nan), lambda: torch.ones(4), 1e-3)
        yield OpCase("raises", lambda: 1 / 0, lambda: torch.ones(4), 1e-3)
        yield OpCase("right", lambda: torch.ones(4), lambda: torch.ones(4), 0.0, "bits")

    monkeypatch.setattr(check_steps, "CASES", {"swiglu": cases})
    rows = list(check_steps.check("swiglu", CPU, False))
    assert [row["passed"] for row in rows] == [False, False, False, True]
    assert "ZeroDivisionError" in rows[2]["message"]
    with pytest.raises(LookupError, match="add a generator"):
        next(check_steps.check("rope", CPU, False))


def test_errors_are_measured_in_the_last_place() -> None:
    """Known answers: half a unit of rounding, and one neighbour away."""
    truth = torch.tensor([1.0 + 2**-11, 3.0], dtype=torch.float64)
    assert ulps(truth.half(), truth) == pytest.approx(0.5)
    neighbour = torch.tensor([1.0, 3.0 + 2**-9]).half()
    assert ulps(neighbour, torch.tensor([1.0, 3.0]).double()) == pytest.approx(1.0)
    shape = OpCase("shape", lambda: torch.ones(2), lambda: torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"\[2\]"):
        measure_error(shape)


@pytest.mark.parametrize(
    "layout",
    [MIXED, TRELLIS_TINY, VQLayout.uniform(600, 16, 3, codec="trellis", window=10)],
    ids=["lookup", "trellis", "segments"],
)
def test_decoding_follows_the_definition(layout: VQLayout) -> None:
    weight = random_weight(layout, seed=4)
    torch.testing.assert_close(decode(weight).numpy(), oracle(weight), rtol=1e-12, atol=0)


def test_a_peer_that_is_not_installed_is_named() -> None:
    with pytest.raises(AbsentError, match="no_such_peer"):
        wanted("no_such_peer")


def test_the_sanitizer_is_asked_for_every_tool(tmp_path: Path) -> None:
    """A stand-in that finds something in racecheck."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f'#!/bin/sh\n[ "$2" = racecheck ] && echo "========= Race found" && exit '
        f"{sanitizer.FOUND_SOMETHING}\nexit 0\n"
    )
    fake.chmod(0o755)
    rows = list(sanitizer.sanitize(["swiglu"], str(fake)))
    assert [row["tool"] for row in rows] == list(sanitizer.TOOLS)
    assert [row["passed"] for row in rows] == [True, False, True, True]


@pytest.mark.gpu
def test_the_clock_captures_what_it_can_and_says_what_it_cannot() -> None:
    x = torch.ones(1 << 20, device="cuda")
    clock = find_place(interpret=False).clock
    for call, how in ((lambda: x * 2, "graph"), (lambda: x.sum().item(), "eager")):
        timing = clock.time([call])
        assert timing is not None
        assert timing.how == how
        assert 0 < timing.least_us <= timing.us <= timing.most_us
    assert clock.copies(1 << 20) * (1 << 20) > torch.cuda.get_device_properties(0).L2_cache_size


def step(
    name: str, run: Callable[[], Iterator[Row]], rank: int = 0, expected_s: float = 0.0
) -> Step:
    return Step(name, rank, expected_s, run)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def command(folder: Path, *more: str) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.gpu_suite"]
    return [*module, "--out", str(folder), *more, "--interpret"]


def suite(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *more), env=environment(), capture_output=True, text=True, timeout=600
    )
