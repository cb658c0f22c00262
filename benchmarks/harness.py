"""Paired timing: contenders take turns in one process, so that a noisy machine hits them alike.

Called by the `bench_*` scripts. Reports median, 20th and 80th percentile and minimum; says how
busy the machine was, because numbers of a busy machine are not to be published.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 15, round_s: float = 0.02
) -> dict[str, dict[str, float]]:
    """Time functions against each other.

    Args:
        contenders: what to run, by name.
        rounds: turns each one gets.
        round_s: about how long one turn lasts, in seconds.

    Returns:
        For each name median, p20, p80 and min of the time of one call, in microseconds.
    """
    repeats = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(round_s / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: _summary(taken) for name, taken in times.items()}


def taking_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Make one function of several that do the same elsewhere: each call runs the next."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def environment() -> dict[str, Any]:
    """Describe the machine: processor, threads, versions, load of the last minute."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(document: dict[str, Any], path: str | None) -> None:
    """Print the result as the last line, one JSON document, and write it to `path` if given."""
    if path is not None:
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def _summary(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=5)
    return {
        "median_us": round(statistics.median(times), 2),
        "p20_us": round(cuts[0], 2),
        "p80_us": round(cuts[3], 2),
        "min_us": round(min(times), 2),
    }
