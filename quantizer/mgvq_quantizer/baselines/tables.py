"""A comparison as a Markdown table and as a plot (called by `cli`)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvq_quantizer.baselines.comparison import OURS, Row
from mgvq_runtime.errors import ConfigError


@dataclass(frozen=True)
class Line:
    """The rows of one quantizer at one rate, over its seeds."""

    label: str
    target: float
    rows: tuple[Row, ...]

    @property
    def is_defined(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.measured)

    @property
    def measured(self) -> list[Row]:
        """The rows with marks."""
        return [row for row in self.rows if row.marks is not None]

    def mean_and_spread(self, name: str) -> tuple[float, float | None]:
        """Return mean and standard deviation over seeds of a mark, or of `bits_per_weight`."""
        of_row = name == "bits_per_weight"
        values = [float(getattr(row if of_row else row.marks, name)) for row in self.measured]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Group rows over seeds; by target, then by KL, the undefined ones last."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.label, row.target), []).append(row)
    lines = [Line(label, target, tuple(group)) for (label, target), group in groups.items()]

    def place(line: Line) -> tuple[float, bool, float]:
        kl = line.mean_and_spread("kl")[0] if line.is_defined else 0.0
        return line.target, not line.is_defined, kl

    return sorted(lines, key=place)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, with what its columns mean."""
    lines = [
        "| quantizer | target | bits in full | KL | same first choice | accuracy | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines_of(rows):
        start = f"| {line.label} | {line.target:g} |"
        if not line.is_defined:
            lines.append(f"{start} not defined | | | | |")
            continue
        bits, _ = line.mean_and_spread("bits_per_weight")
        cells = [
            f"{bits:.3f}",
            _cell(*line.mean_and_spread("kl"), "{:.4f}"),
            _cell(*line.mean_and_spread("top1_agreement"), "{:.2%}"),
            _cell(*line.mean_and_spread("accuracy"), "{:.2%}"),
            str(len(line.measured)),
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(rows)]) + "\n"


def _cell(mean: float, spread: float | None, form: str) -> str:
    return form.format(mean) + ("" if spread is None else " ± " + form.format(spread))


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what has to be known to read the table."""
    measured = [row.marks for row in rows if row.marks is not None]
    notes = [
        "Bits a weight of the decoder's matrices, in full: codes, scales, offsets, codebooks,",
        "signs, permutations. KL(unquantized || quantized) in nats an answer token. ± is the",
        "standard deviation over seeds. A baseline may cost up to 5 % more than its target.",
    ]
    if measured:
        first = measured[0]
        notes.append(
            f"{first.n} questions, {first.n_tokens} answer tokens; the unquantized model answers "
            f"{first.reference_accuracy:.2%}."
        )
    others = sorted({row.quantized for row in rows if row.quantized != "decoder"})
    if others:
        notes.append(f"MGVQ rows have more than the decoder quantized: {'; '.join(others)}.")
    return notes


def require_matplotlib() -> None:
    """Find out before hours of work that the plot cannot be drawn.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install 'mgvq-runtime[bench]'") from error


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw KL against bits in full, both as measured; one line a quantizer.

    Args:
        rows: those without marks are left out.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[Line]] = {}
    for line in lines_of(rows):
        if line.is_defined:
            curves.setdefault(line.label, []).append(line)
    markers = itertools.cycle("osD^vPX<>h")
    for label, lines in curves.items():
        points = sorted(
            (line.mean_and_spread("bits_per_weight")[0], *line.mean_and_spread("kl"))
            for line in lines
        )
        bits, kl, spread = zip(*points, strict=True)
        is_ours = lines[0].rows[0].source is not None
        axes.errorbar(
            bits,
            kl,
            yerr=[s or 0.0 for s in spread],
            label=label,
            marker="*" if is_ours else next(markers),
            markersize=12 if is_ours else 6,
            color="black" if label == OURS else None,
            linewidth=1.2,
            capsize=3,
            zorder=3 if is_ours else 2,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a decoder weight, in full")
    axes.set_ylabel("KL from the unquantized model, nats an answer token")
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(file)
