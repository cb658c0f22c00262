"""compute-sanitizer over the small checks of every op, a process a tool and op (`--sanitizer`).

Called by `__main__` after the timed steps, outside their budget: a sanitized process is slow.
Memory is taken with plain cudaMalloc, so that each buffer has borders that are watched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_suite.steps import Journal, Row

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

KNOWN_PLACES = "/usr/local/cuda/bin"
"""Where the CUDA toolkit puts it when PATH does not say."""

FOUND_SOMETHING = 86
"""Exit code the sanitizer is asked to give for an error of its own."""

LIMIT_S = 300


def sanitize(folder: Path, ops: Sequence[str], command: str | None) -> Iterator[Row]:
    """Run every tool over the small check of every op.

    Args:
        folder: where scratch journals go.
        ops: names of ops.
        command: the sanitizer's path, or None where it is not installed.

    Yields:
        Tool, op, verdict and whether it passed; one row with the reason if there is no sanitizer.
    """
    if command is None:
        why = "compute-sanitizer is not on PATH nor in " + KNOWN_PLACES
        yield {"kind": "absent", "variant": "compute-sanitizer", "absent": why}
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for op in ops:
        for tool in TOOLS:
            journal = Journal(folder / f"sanitizer_{tool}_{op}.jsonl")
            journal.path.unlink(missing_ok=True)
            arguments = ["--only", f"check {op}", "--small", "--step-seconds", str(LIMIT_S)]
            process = [
                command, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING),
                sys.executable, "-m", "benchmarks.gpu_suite.worker",
                "--journal", str(journal.path), "--deadline", str(time.time() + 10 * LIMIT_S),
                *arguments,
            ]  # fmt: skip
            try:
                run = subprocess.run(
                    process, env=environment, capture_output=True, text=True, timeout=LIMIT_S
                )
                verdict = describe(run.returncode, run.stdout)
            except subprocess.TimeoutExpired:
                verdict = f"not finished in {LIMIT_S} s"
            row: Row = {"kind": "sanitizer", "tool": tool, "op": op, "verdict": verdict}
            yield row | {"passed": verdict == "clean"}


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
