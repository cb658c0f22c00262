"""The process that touches the device: runs what the journal lacks (started by `__main__`).

    python -m benchmarks.gpu_suite.worker --journal FILE --deadline SECONDS

Ends with 0 when every step is settled and with `LOST_CONTEXT` when an error left the device
unusable, so that the parent starts another one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_suite.check_steps import check_steps
from benchmarks.gpu_suite.device_steps import device_steps
from benchmarks.gpu_suite.peers import peer_steps
from benchmarks.gpu_suite.place import find_place
from benchmarks.gpu_suite.steps import Journal, run_steps
from benchmarks.gpu_suite.time_steps import time_steps

LOST_CONTEXT = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    options = parse(argv)
    place = find_place(options.interpret)
    steps = check_steps(place, real=place.is_gpu and not options.small)
    if not options.small:
        steps = [*device_steps(place), *steps, *time_steps(place), *peer_steps(place)]
    done = run_steps(
        [step for step in steps if is_wanted(step.name, options)],
        Journal(options.journal),
        options.deadline,
        options.step_seconds,
        place.is_healthy,
    )
    return 0 if done else LOST_CONTEXT


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--step-seconds", type=int, default=120)
    parser.add_argument("--only", default="", help="only steps that begin so, and device")
    parser.add_argument("--step", help="only the step of this name")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--small", action="store_true", help="only checks of small shapes")
    return parser.parse_args(argv)


def is_wanted(name: str, options: argparse.Namespace) -> bool:
    """Say whether a step is asked for: by its whole name, or by how it begins (and device)."""
    if options.step is not None:
        return bool(name == options.step)
    return name == "device" or name.startswith(options.only)


if __name__ == "__main__":
    sys.exit(main())
