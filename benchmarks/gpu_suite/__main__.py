"""The first ten minutes on a GPU: is every kernel right, how fast is it, how fast are the others.

    python -m benchmarks.gpu_suite [--minutes 10] [--out DIR] [--sanitizer]
    python -m benchmarks.gpu_suite --interpret     # no GPU: the whole flow, tiny shapes, no times

Device facts, copy bandwidth and launch cost; every op of `ops.OPS` against float64; every way to
multiply over the matrices of three models, in CUDA graphs with buffers that outrun the cache; the
other ops; other people's kernels. Writes `gpu_suite_<device>.json` and a Markdown table.

The work is done by a child process, so that a crash or a hang costs one step: the next child goes
on behind it. Exit code 0: all right; 1: something failed or raised; 2: no GPU; 130: stopped by
hand, with what was measured until then written.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_suite import report, sanitizer
from benchmarks.gpu_suite.steps import Journal
from mgvq_kernels import ops

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; returns the exit code."""
    options = parse(argv)
    if not options.interpret and not torch.cuda.is_available():
        print("gpu_suite: no CUDA device is visible; --interpret runs without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "gpu_suite.jsonl")
    journal.path.unlink(missing_ok=True)
    interrupted = False
    try:
        run_workers(options, journal)
        if options.sanitizer:
            for row in sanitizer.sanitize(ops.OPS, sanitizer.find()):
                journal.write("row", "sanitizer", row=row)
                print(
                    row.get("absent") or f"{row['tool']} {row['op']}: {row['verdict']}", flush=True
                )
    except KeyboardInterrupt:
        interrupted = True
        journal.close_open_step("stopped by hand")
    result = report.document(journal, options.minutes, interrupted)
    path = report.write(result, options.out)
    journal.path.unlink()
    passed = sum(row["passed"] for row in result["check"])
    print(
        f"{passed} of {len(result['check'])} checks passed, {len(result['errors'])} steps raised, "
        f"{len(result['dropped'])} dropped; {path} and .md"
    )
    if interrupted:
        return 130
    return 0 if report.is_clean(result) else 1


def run_workers(options: argparse.Namespace, journal: Journal) -> None:
    """Start workers until one settles every step, or one dies without settling any."""
    command = [
        sys.executable, "-m", "benchmarks.gpu_suite.worker",
        "--journal", str(journal.path),
        "--deadline", str(time.time() + 60 * options.minutes),
        "--step-seconds", str(options.step_seconds),
        "--only", options.only,
    ]  # fmt: skip
    environment = dict(os.environ)
    if options.interpret:
        command.append("--interpret")
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported: a child's only
    while True:
        settled = len(journal.settled())
        worker = subprocess.Popen(command, env=environment)
        try:
            returncode = worker.wait()
        except KeyboardInterrupt:
            worker.terminate()
            worker.wait()
            raise
        if returncode == 0:
            return
        journal.close_open_step(describe_exit(returncode))
        if len(journal.settled()) == settled:
            why = f"the worker {describe_exit(returncode)} before its first step; see its output"
            journal.write("end", "start", error=why, seconds=None)
            return
        print(f"worker {describe_exit(returncode)}; going on with the next step", flush=True)


def describe_exit(returncode: int) -> str:
    """Say how a process ended."""
    if returncode == -signal.SIGALRM:
        return "was stopped: the step took too long"
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with code {returncode}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=10, help="budget; the least important goes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--step-seconds", type=int, default=120, help="most time of one result")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only steps that begin so")
    parser.add_argument("--interpret", action="store_true", help="run without a GPU, time nothing")
    parser.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
