"""A comparison as a picture (called by `cli`).

A column for each amount of tuning. Above, KL against bits, both as measured, one curve a quantizer;
below, what each change to MGVQ does to its KL, where the whole was measured as well, seed by seed;
an ablation without it is a curve. A quantizer looks the same in every panel.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgvq_quantizer.baselines.ours import CHANGES, OURS, VARIANTS, Variant
from mgvq_quantizer.baselines.rows import Row
from mgvq_quantizer.baselines.tables import Line, lines_of
from mgvq_runtime.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHANGED = {variant.label: variant for variant in VARIANTS.values() if variant.base}
_MARKERS = "osD^vPX<>h"


def require_matplotlib() -> None:
    """Find out before hours of work that the plot cannot be drawn.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install -e '.[bench]'") from error


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw a comparison.

    Args:
        rows: those without marks are left out.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    lines = [line for line in lines_of(rows) if line.is_defined]
    steps = sorted({line.tuning_steps for line in lines}) or [0]
    there = {(_name(line), line.target, line.tuning_steps) for line in lines}
    ablations = [x for x in lines if (_base(x), x.target, x.tuning_steps) in there]
    curves = [line for line in lines if line not in ablations]
    found = {_CHANGED[_name(line)].change for line in ablations}
    changes = [change for change in CHANGES if change in found]
    wholes = sorted({(_base(line), line.target) for line in ablations})
    figure = Figure(figsize=(6.0 * len(steps) + 2.0, 9.6 if changes else 4.8), dpi=150)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1 + bool(changes), len(steps), squeeze=False, sharey="row")
    names = list(dict.fromkeys(_name(line) for line in curves))
    for column, number in enumerate(steps):
        title = f"tuned {number} steps" if number else "untuned"
        _curves(panels[0, column], [x for x in curves if x.tuning_steps == number], names)
        panels[0, column].set_title(title)
        if changes:
            shown = [line for line in lines if line.tuning_steps == number]
            _ablations(panels[1, column], shown, changes, wholes)
            panels[1, column].set_title(f"{OURS} with one change, {title}")
            panels[1, column].set_visible(any(x.tuning_steps == number for x in ablations))
    panels[0, 0].set_ylabel("KL from the unquantized model, nats a token")
    handles = {
        name: handle
        for axes in panels.flat
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    figure.savefig(file)


def _name(line: Line) -> str:
    """The label without the tuning, which the panel's title says."""
    return line.label.partition(", tuned ")[0]


def _variant(line: Line) -> Variant | None:
    """The variant of MGVQ with one change that this is, if it is one."""
    return _CHANGED.get(_name(line)) if line.is_ours else None


def _base(line: Line) -> str:
    """The label of the whole that this changes; empty if it is none."""
    variant = _variant(line)
    return "" if variant is None else variant.base


def _curves(axes: Axes, lines: Sequence[Line], names: Sequence[str]) -> None:
    """One curve a quantizer; its place in `names` decides colour and marker."""
    curves: dict[str, list[Line]] = {}
    for line in lines:
        curves.setdefault(_name(line), []).append(line)
    for name, curve in curves.items():
        points = sorted(
            (line.mean_and_spread("bits_per_weight")[0], *line.mean_and_spread("kl"))
            for line in curve
        )
        bits, kl, spread = zip(*points, strict=True)
        is_ours = curve[0].is_ours
        axes.errorbar(
            bits,
            kl,
            yerr=[s or 0.0 for s in spread],
            label=name,
            marker="*" if is_ours else _MARKERS[names.index(name) % len(_MARKERS)],
            markersize=12 if is_ours else 6,
            color="black" if name == OURS else _colour(names.index(name)),
            linewidth=1.2,
            capsize=3,
            zorder=3 if is_ours else 2,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a decoder weight, in full")
    axes.grid(visible=True, which="both", alpha=0.25)


def _colour(place: int) -> Any:
    """Return the colour of a curve: ten strong ones, then the same in pale."""
    from matplotlib import colormaps

    return f"C{place}" if place < 10 else colormaps["tab20"](2 * (place % 10) + 1)


def _ablations(
    axes: Axes, lines: Sequence[Line], changes: Sequence[str], wholes: Sequence[tuple[str, float]]
) -> None:
    """One row a change, one mark a whole and rate: KL as a multiple of that whole's.

    The place of whole and rate in `wholes` decides colour and marker.
    """
    from matplotlib.ticker import LogLocator

    there = {(_name(line), line.target): line for line in lines if line.kl > 0}
    groups: dict[tuple[str, float], list[tuple[int, float, float]]] = {}
    for line in lines:
        variant = _variant(line)
        if variant is not None and (key := (variant.base, line.target)) in there:
            place = changes.index(variant.change)
            groups.setdefault(key, []).append((place, *_multiple(line, there[key])))
    for (whole, target), marks in groups.items():
        places, multiples, spreads = zip(*marks, strict=True)
        i = wholes.index((whole, target))
        shift = 0.6 / len(wholes) * (i - (len(wholes) - 1) / 2)
        axes.errorbar(
            multiples,
            [place + shift for place in places],
            xerr=spreads,
            fmt=_MARKERS[i % len(_MARKERS)],
            color=f"C{i}",
            label=f"{whole} changed, {target:g} bits",
            capsize=3,
        )
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_xscale("log")  # a part that multiplies the loss leaves the others their room
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2.0))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(changes)), [change.replace("-", " ") for change in changes])
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.set_xlabel("KL as a multiple of the whole's")
    axes.grid(visible=True, axis="x", alpha=0.25)


def _multiple(line: Line, whole: Line) -> tuple[float, float]:
    """KL over the whole's, mean and spread, on the seeds both have; of the means if on none."""
    kl, reference = line.kl_by_seed, whole.kl_by_seed
    multiples = [kl[seed] / reference[seed] for seed in kl if reference.get(seed)]
    if not multiples:
        return line.kl / whole.kl, 0.0
    return statistics.fmean(multiples), statistics.stdev(multiples) if len(multiples) > 1 else 0.0
