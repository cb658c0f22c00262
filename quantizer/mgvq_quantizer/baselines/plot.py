"""A comparison as a picture (called by `cli`).

A column for each amount of tuning. Above, KL against bits, both as measured, one curve a quantizer;
below, what each change to MGVQ does to its KL, where the whole was measured as well; an ablation
without it is a curve. A quantizer looks the same in every panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgvq_quantizer.baselines.ours import VARIANTS
from mgvq_quantizer.baselines.rows import Row
from mgvq_quantizer.baselines.tables import Line, lines_of
from mgvq_runtime.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHOLE = VARIANTS["mgvq"].label
_MARKERS = "osD^vPX<>h"


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
    """Draw a comparison.

    Args:
        rows: those without marks are left out.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    lines = [line for line in lines_of(rows) if line.is_defined]
    steps = sorted({line.tuning_steps for line in lines}) or [0]
    whole = {(line.target, line.tuning_steps) for line in lines if _name(line) == _WHOLE}
    ablations = [x for x in lines if _is_ablation(x) and (x.target, x.tuning_steps) in whole]
    curves = [line for line in lines if line not in ablations]
    changed = bool(ablations)
    figure = Figure(figsize=(6.0 * len(steps) + 2.0, 9.6 if changed else 4.8), dpi=150)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1 + changed, len(steps), squeeze=False, sharey="row")
    names = list(dict.fromkeys(_name(line) for line in curves))
    for column, number in enumerate(steps):
        title = f"tuned {number} steps" if number else "untuned"
        _curves(panels[0, column], [x for x in curves if x.tuning_steps == number], names)
        panels[0, column].set_title(title)
        if changed:
            _ablations(panels[1, column], [x for x in lines if x.tuning_steps == number])
            panels[1, column].set_title(f"{_WHOLE} with one change, {title}")
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


def _is_ablation(line: Line) -> bool:
    """Whether this is MGVQ with something changed."""
    return line.is_ours and _name(line).startswith(f"{_WHOLE}, ")


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
            color="black" if name == _WHOLE else f"C{names.index(name)}",
            linewidth=1.2,
            capsize=3,
            zorder=3 if is_ours else 2,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a decoder weight, in full")
    axes.grid(visible=True, which="both", alpha=0.25)


def _ablations(axes: Axes, lines: Sequence[Line]) -> None:
    """One row a change, one mark a rate: the change's KL as a multiple of the whole method's."""
    whole = {line.target: line.kl for line in lines if _name(line) == _WHOLE and line.kl > 0}
    changes = [line for line in lines if _is_ablation(line) and line.target in whole]
    labels = [variant.label for variant in VARIANTS.values() if variant.label != _WHOLE]
    for i, target in enumerate(sorted(whole)):
        mine = [line for line in changes if line.target == target]
        shift = 0.2 * (i - (len(whole) - 1) / 2)
        axes.errorbar(
            [line.kl / whole[target] for line in mine],
            [labels.index(_name(line)) + shift for line in mine],
            xerr=[(line.mean_and_spread("kl")[1] or 0.0) / whole[target] for line in mine],
            fmt=_MARKERS[i % len(_MARKERS)],
            color=f"C{i}",
            label=f"{_WHOLE} changed, {target:g} bits",
            capsize=3,
        )
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_yticks(range(len(labels)), [text.removeprefix(f"{_WHOLE}, ") for text in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"KL as a multiple of {_WHOLE}'s")
    axes.grid(visible=True, axis="x", alpha=0.25)
