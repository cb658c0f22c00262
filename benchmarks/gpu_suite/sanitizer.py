"""compute-sanitizer over the small checks of every op, a process a tool and op (`--sanitizer`).

Called by `__main__` after the timed steps, outside their budget: a sanitized process is slow.
Memory is taken with plain cudaMalloc, so that each buffer has borders that are watched.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_suite.steps import Row

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

KNOWN_PLACES = "/usr/local/cuda/bin"
"""Where the CUDA toolkit puts it when PATH does not say."""

FOUND_SOMETHING = 86
"""Exit code the sanitizer is asked to give for an error of its own."""

LIMIT_S = 300


def sanitize(ops: Sequence[str], command: str | None) -> Iterator[Row]:
    """Run every tool over the small check of every op.

    Args:
        ops: names of ops.
        command: the sanitizer's path, or None where it is not installed.

    Yields:
        Tool, op, verdict and whether it passed; one row with the reason if there is no sanitizer.
    """
    if command is None:
        why = "compute-sanitizer is not on PATH nor in " + KNOWN_PLACES
        yield {"kind": "absent", "variant": "compute-sanitizer", "absent": why}
        return
    for op, tool in itertools.product(ops, TOOLS):
        verdict = sanitize_one(op, tool, command)
        row: Row = {"kind": "sanitizer", "tool": tool, "op": op, "verdict": verdict}
        yield row | {"passed": verdict == "clean"}


def sanitize_one(op: str, tool: str, command: str) -> str:
    """Run one tool over one op: "clean", or what was found, or that it took too long."""
    with tempfile.TemporaryDirectory() as folder:
        process = [
            command, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING),
            sys.executable, "-m", "benchmarks.gpu_suite.worker", "--small", "--step", f"check {op}",
            "--journal", str(Path(folder) / "journal"), "--step-seconds", str(LIMIT_S),
            "--deadline", str(time.time() + 2 * LIMIT_S),
        ]  # fmt: skip
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(
                process, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"not finished in {LIMIT_S} s"
    return describe(run.returncode, run.stdout)


def describe(returncode: int, output: str) -> str:
    """Say what a sanitized run came to: "clean", or the lines that name the first error."""
    if returncode == 0:
        return "clean"
    found = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    why = "; ".join(found[1:5]) or output[-300:]
    return f"exit {returncode}: {why}"


def find() -> str | None:
    """Find the sanitizer; None where there is none."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=KNOWN_PLACES)
