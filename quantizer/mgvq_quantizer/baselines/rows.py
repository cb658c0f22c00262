"""Finished rows of a comparison, and the folder that keeps them (for `comparison`, `tables`).

A row is one quantizer at one rate with one seed, and what the model said afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq_quantizer.evaluate import Marks
from mgvq_quantizer.evaluate_text import TextMarks
from mgvq_quantizer.work_folder import ResumeError
from mgvq_runtime.checkpoint.files import unwritable

FILE_NAME = "compare.json"


@dataclass(frozen=True)
class Row:
    """One quantizer at one rate with one seed, and what became of the model."""

    label: str
    """What tables and plots call the quantizer; rows of one label and target are averaged."""
    target: float
    """Bits a weight that were asked for."""
    seed: int
    source: str | None = None
    """The folder of an MGVQ checkpoint, with its fingerprint."""
    undefined: str | None = None
    """Why there is nothing to measure."""
    bits_per_weight: float | None = None
    """Of the decoder's matrices, in full."""
    quantized: str = "decoder"
    """Which groups of matrices were quantized."""
    tuning_steps: int = 0
    """Steps of end-to-end tuning that were allowed; rows with equal ones are compared."""
    is_ours: bool = False
    """Whether this is MGVQ, in whole or in part, rather than a baseline."""
    recipe: str | None = None
    """Digest of all settings of a run of MGVQ; not of rows that were written without it."""
    marks: Marks | None = None
    """For the questions, where there are any."""
    text: TextMarks | None = None
    """For the text, where one was given."""
    seconds: float = 0.0
    """Quantization and examination; of a checkpoint, the examination alone."""
    processor_seconds: float = 0.0
    """The same in processor time. What rows share is in the first row that needs it."""

    @property
    def judged(self) -> Marks | TextMarks | None:
        """What the row is compared by: the questions, or the text where there are none."""
        return self.marks or self.text

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells rows apart."""
        return (self.label, self.target, self.seed)


class Comparison:
    """The rows of an output folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            folder: where `compare.json` is, or will be.
            facts: what all rows have in common. JSON values.

        Raises:
            CheckpointError: if the folder cannot be written.
            ResumeError: if it holds a comparison with other facts.
        """
        self._file, self.facts = folder / FILE_NAME, dict(facts)
        self.rows: list[Row] = []
        make_folder(folder)
        if self._file.exists():
            self._read()
        else:  # before any work: what an interrupted first row leaves behind belongs to these facts
            self._write()

    def has(self, row: Row) -> bool:
        """Return whether a row is finished; one of another checkpoint or recipe does not count."""
        return any(
            (old.key, old.source) == (row.key, row.source) and old.recipe in (None, row.recipe)
            for old in self.rows
        )

    def add(self, row: Row) -> None:
        """Keep a finished row, on disk too; it takes the place of one with the same key."""
        self.rows = [*(old for old in self.rows if old.key != row.key), row]
        self._write()

    def _write(self) -> None:
        lines = (json.dumps(_to_json(row)) for row in self.rows)
        rows = ",\n".join(lines)
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(f'{{"facts": {json.dumps(self.facts)}, "rows": [\n{rows}\n]}}\n')
            os.replace(temporary, self._file)
        except OSError as error:
            raise unwritable(self._file, error) from error

    def _read(self) -> None:
        try:
            content = json.loads(self._file.read_text())
            old = content["facts"]
            self.rows = [_row(values) for values in content["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self._file} cannot be read ({error}): delete it") from error
        for key in sorted({*old, *self.facts}):
            if old.get(key) != self.facts.get(key):
                raise ResumeError(
                    f"{self._file} holds rows with {key} = {old.get(key)!r}, this run has "
                    f"{self.facts.get(key)!r}: use the same, or another --output"
                )


def make_folder(folder: Path) -> None:
    """Make the folder of a comparison, or find it.

    Raises:
        CheckpointError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def _to_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON values: what was measured in five digits, and nothing that is None."""
    values = dataclasses.asdict(row)
    return {
        name: value if name == "target" else _shortened(value)  # the target tells rows apart
        for name, value in values.items()
        if value is not None
    }


def _shortened(value: Any) -> Any:
    """Return a JSON value with numbers of five digits: more than any of them is sure of."""
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _row(values: dict[str, Any]) -> Row:
    marks, text = values.pop("marks", None), values.pop("text", None)
    return Row(
        **values,
        marks=None if marks is None else Marks(**marks),
        text=None if text is None else TextMarks(**text),
    )
