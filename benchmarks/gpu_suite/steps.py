"""Steps, the journal they are written to, and the loop that runs them (called by the worker).

A step is the unit that may fail: its error is written down and the next one runs. The journal is a
file of JSON lines, complete after every row, so that a killed process loses only the row it was
at. Choosing what a step does is not done here.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A piece of work that yields rows of results."""

    name: str
    rank: int
    """0 is what matters most; the highest ranks are dropped first."""
    expected_s: float
    """About how long it takes, compilation included; a step that does not fit is dropped."""
    run: Callable[[], Iterator[Row]]
    """Yields rows of results; what it yielded before an error is kept."""


class Journal:
    """The record of a run, appended to by workers and read by the process that started them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: str, **more: Any) -> None:
        """Append one event."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **more}) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """Read every event so far, oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def settled(self) -> set[str]:
        """Name the steps that ended or were dropped."""
        return {e["step"] for e in self.events() if e["event"] in ("end", "dropped")}

    def close_open_step(self, why: str) -> None:
        """Write the step that began and never ended down as failed."""
        settled = self.settled()
        for event in self.events():
            if event["event"] == "begin" and event["step"] not in settled:
                self.write("end", event["step"], error=why, seconds=None)


def run_steps(
    steps: Sequence[Step],
    journal: Journal,
    deadline: float,
    step_seconds: int,
    is_healthy: Callable[[], bool],
) -> bool:
    """Run what the journal does not hold yet, the most important first.

    Args:
        steps: everything there is to do.
        journal: where results go.
        deadline: `time.time()` by which all should be done.
        step_seconds: a step that yields nothing for so long is killed, with its process.
        is_healthy: says after an error whether this process can still use the device.

    Returns:
        Whether all steps are settled; False asks for a new process.
    """
    settled = journal.settled()
    todo = [step for step in sorted(steps, key=lambda step: step.rank) if step.name not in settled]
    for number, step in enumerate(todo, len(settled) + 1):
        left = deadline - time.time()
        title = f"[{number}/{len(steps)}] {step.name}"
        if left < step.expected_s:
            why = f"needs about {step.expected_s:.0f} s, {max(left, 0):.0f} s were left"
            journal.write("dropped", step.name, why=why)
            print(f"{title}: dropped, {why}", flush=True)
            continue
        journal.write("begin", step.name)
        start = time.time()
        signal.alarm(step_seconds)  # the default action ends a process that hangs in a driver call
        rows: list[Row] = []
        error = None
        try:
            for row in step.run():
                rows.append(row)
                journal.write("row", step.name, row=row)
                signal.alarm(step_seconds)
        except Exception as raised:  # noqa: BLE001  a step may fail in any way; it is written down
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
        signal.alarm(0)
        seconds = round(time.time() - start, 2)
        journal.write("end", step.name, error=error, seconds=seconds)
        print(
            f"{title}: {summary(rows, error)}  {seconds} s, {left - seconds:.0f} s left", flush=True
        )
        if (error is not None or failures(rows)) and not is_healthy():
            return False
    return True


def failures(rows: Sequence[Row]) -> list[Row]:
    """Pick the checks that did not pass."""
    return [row for row in rows if row.get("passed") is False]


def summary(rows: Sequence[Row], error: str | None) -> str:
    """Say in a few words how a step went."""
    if error is not None:
        return f"ERROR {error.splitlines()[0][:120]}"
    if failures(rows):
        return f"{len(failures(rows))} of {len(rows)} FAILED"
    absent = [row["absent"] for row in rows if "absent" in row]
    return f"absent: {absent[0]}" if absent else f"{len(rows)} rows"
