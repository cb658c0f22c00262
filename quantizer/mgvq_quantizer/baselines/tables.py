"""A comparison as Markdown tables, one for each rate and amount of tuning (called by `cli`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mgvq_quantizer.baselines.rows import Row

_COLUMNS = ("bits in full", "KL", "of best baseline", "same first choice")
_ACCURACY, _PERPLEXITY = "accuracy", "perplexity"
"""Columns where there were questions, and where a text was given."""


@dataclass(frozen=True)
class Line:
    """The rows of one quantizer at one rate, over its seeds."""

    label: str
    target: float
    tuning_steps: int
    is_ours: bool
    rows: tuple[Row, ...]

    @property
    def is_defined(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.measured)

    @property
    def measured(self) -> list[Row]:
        """The rows of which anything is known."""
        return [row for row in self.rows if row.judged is not None]

    def mean_and_spread(self, name: str) -> tuple[float, float | None]:
        """Return mean and standard deviation over seeds of a mark, or of the bits a weight."""
        values = [_value(row, name) for row in self.measured]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def kl(self) -> float:
        """The mean KL; infinite where nothing was measured."""
        return self.mean_and_spread("kl")[0] if self.is_defined else float("inf")

    @property
    def kl_by_seed(self) -> dict[int, float]:
        """The KL with each seed."""
        return {row.seed: _value(row, "kl") for row in self.measured}


def _value(row: Row, name: str) -> float:
    """Return a number by name: perplexity is the text's, other marks are of what judges the row."""
    source = {"bits_per_weight": row, _PERPLEXITY: row.text}.get(name, row.judged)
    return float(getattr(source, name))


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Group rows over seeds; by target, then tuning, then KL, the undefined ones last."""
    groups: dict[tuple[str, float, int, bool], list[Row]] = {}
    for row in rows:
        key = (row.label, row.target, row.tuning_steps, row.is_ours)
        groups.setdefault(key, []).append(row)
    lines = [Line(*key, tuple(group)) for key, group in groups.items()]
    return sorted(lines, key=lambda line: (line.target, line.tuning_steps, line.kl))


def best_baseline(lines: Sequence[Line], target: float, tuning_steps: int) -> Line | None:
    """Return the baseline with the least KL within a target; None where none was measured.

    One at a lower rate counts too: some methods have no setting for every rate.
    """
    theirs = [
        line
        for line in lines
        if line.is_defined
        and not line.is_ours
        and line.target <= target
        and line.tuning_steps == tuning_steps
    ]
    return min(theirs, key=lambda line: line.kl, default=None)


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables, with what their columns mean."""
    text: list[str] = []
    lines = lines_of(rows)
    columns = _columns(rows)
    alike = groupby(lines, key=lambda line: (line.target, line.tuning_steps))
    for (target, steps), group in alike:
        best = best_baseline(lines, target, steps)
        tuned = f"tuned {steps} steps" if steps else "untuned"
        text += [f"### {target:g} bits, {tuned}", ""]
        if best is not None and best.target < target:
            bits, _ = best.mean_and_spread("bits_per_weight")
            text += [f"The best baseline is {best.label} at {bits:.3f} bits, KL {best.kl:.5f}.", ""]
        text += [
            f"| quantizer | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(_table_row(line, best, columns) for line in group),
            "",
        ]
    return "\n".join([*text, *_notes(rows)]) + "\n"


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    asked = (_ACCURACY,) * any(row.marks is not None for row in rows)
    read = (_PERPLEXITY,) * any(row.text is not None for row in rows)
    return (*_COLUMNS, *asked, *read, "seeds")


def _table_row(line: Line, best: Line | None, columns: Sequence[str]) -> str:
    if not line.is_defined:
        return f"| {line.label} | not defined |{' |' * (len(columns) - 1)}"
    cells = {
        "bits in full": f"{line.mean_and_spread('bits_per_weight')[0]:.3f}",
        "KL": _cell(*line.mean_and_spread("kl"), "{:.5f}"),
        "of best baseline": f"{line.kl / best.kl:.2f}" if best is not None and best.kl > 0 else "",
        "same first choice": _cell(*line.mean_and_spread("top1_agreement"), "{:.2%}"),
        "seeds": str(len(line.measured)),
    }
    for name, form in ((_ACCURACY, "{:.2%}"), (_PERPLEXITY, "{:.2f}")):
        if name in columns:
            cells[name] = _cell(*line.mean_and_spread(name), form)
    label = f"**{line.label}**" if line is best else line.label
    return f"| {label} | {' | '.join(cells[column] for column in columns)} |"


def _cell(mean: float, spread: float | None, form: str) -> str:
    return form.format(mean) + ("" if spread is None else " ± " + form.format(spread))


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what has to be known to read the tables."""
    notes = [
        "Bits a weight of the decoder's matrices, in full: codes, scales, offsets, codebooks,",
        "signs, permutations. KL(unquantized || quantized) in nats a token, least first.",
        "The best baseline within the target is bold, or named above the table if it is one of a",
        "lower rate. ± is the standard deviation over seeds. A baseline may cost up to 5 % more",
        "than its target; MGVQ keeps within it, but where its allocation is uniform: the target is",
        "then the bits of its codes alone.",
    ]
    judged = [row.judged for row in rows if row.judged is not None]
    error = max(
        (mark.kl_se / mark.kl for mark in judged if mark.kl_se and mark.kl_se > 0), default=0.0
    )
    if marks := [row.marks for row in rows if row.marks is not None]:
        notes.append(
            f"{marks[0].n} questions, {marks[0].n_tokens} answer tokens; the unquantized model "
            f"answers {marks[0].reference_accuracy:.2%}."
        )
    if texts := [row.text for row in rows if row.text is not None]:
        notes.append(
            f"Perplexity is that of {texts[0].n_tokens} tokens of text; the unquantized model's is "
            f"{texts[0].reference_perplexity:.2f}."
        )
    if error:
        what = "questions" if marks else "windows of text"
        notes.append(f"A KL's standard error over {what} is up to {error:.0%} of it.")
    others = sorted({row.quantized for row in rows if row.quantized != "decoder"})
    if others:
        notes.append(f"MGVQ checkpoints have more quantized than the decoder: {'; '.join(others)}.")
    return notes
