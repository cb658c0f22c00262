"""The report of a quantization run as one page to read (written by `pipeline`).

Self-contained: no script, no network; pictures are inline SVG, colours follow the reader's light or
dark setting. Not here: what the numbers are and where they come from (`report`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import log10
from typing import Any

from mgvq_quantizer.gate import Verdict
from mgvq_quantizer.report import MatrixReport, Report

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2937;--soft:#4b5563;--line:#d1d5db;--heat:#c2410c;
--r1:#93c5fd;--r2:#3b82f6;--r3:#8b5cf6;--r4:#f59e0b;--r5:#ef4444;--r8:#9ca3af}
@media(prefers-color-scheme:dark){:root{--bg:#0b0f19;--fg:#e5e7eb;--soft:#a3adbd;--line:#374151;
--heat:#fb923c}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:1080px;
margin:0 auto;padding:24px 16px}
p,figcaption{color:var(--soft);max-width:72ch}figure{margin:16px 0;overflow-x:auto}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px}
dl div{border:1px solid var(--line);border-radius:8px;padding:10px 14px}dt{color:var(--soft)}
dd{margin:0;font-size:20px;overflow-wrap:anywhere}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:4px 10px;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}svg text{fill:var(--fg);
font:12px system-ui,sans-serif}
.r1{fill:var(--r1)}.r2{fill:var(--r2)}.r3{fill:var(--r3)}.r4{fill:var(--r4)}.r5{fill:var(--r5)}.r8{fill:var(--r8)}
.heat{fill:var(--heat)}.cell{fill:none;stroke:var(--line)}
"""
_LEFT, _ROW, _CELL = 250, 18, 96


def report_page(report: Report) -> str:
    """Return the report as HTML text; equal reports give equal text."""
    matrices = report.matrices
    parts = [
        "<h1>Quantization report</h1>",
        _headlines(report),
        "<h2>Bits</h2>",
        "<p>One bar a matrix. A band is a run of input channels that are stored at one rate; its "
        "width is its share of the channels. Rates are bits of codes; the table below counts "
        "everything.</p>",
        _bits_picture(matrices),
        "<h2>Sensitivity</h2>",
        *_sensitivity(matrices),
        "<h2>Every matrix</h2>",
        "<p>Bits are counted in full, as if the matrix paid alone for tables it shares. Errors are "
        "the share of the output's energy that is lost on calibration data, before tuning: with "
        "plain nearest codewords, and rounded with compensation.</p>",
        _matrix_table(matrices),
        "<h2>Calibration</h2>",
        _facts(report.calibration),
        "<h2>Recipe</h2>",
        _facts(report.recipe),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Quantization report</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _headlines(report: Report) -> str:
    facts = {
        f"bits a weight in full, {name}": f"{group.bits_per_weight:.3f}"
        for name, group in report.groups.items()
    } | {
        "KL after rounding, nats an answer token": f"{report.kl_rounded:.4f}",
        "KL as written, nats an answer token": f"{report.kl:.4f}",
        "tuning steps kept": str(report.tuning_steps_kept),
        "seconds, of the last part if resumed": f"{report.seconds:.0f}",
        "memory at the peak": f"{report.peak_memory_bytes / 2**20:.0f} MiB",
    }
    cells = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    note = (
        "<p>KL is the divergence from the original model on held-out conversations of the "
        "calibration data. They also chose the tuning step that was kept, and the rounding of a "
        "matrix where several were tried, so expect a little more on other data.</p>"
    )
    return f"<dl>{cells}</dl>{note}"


def _bits_picture(matrices: Mapping[str, MatrixReport]) -> str:
    rates = sorted({rate for matrix in matrices.values() for rate, _ in matrix.bands})
    body = [
        f'<rect class="r{rate}" x="{_LEFT + 90 * i}" y="2" width="12" height="12"/>'
        f'<text x="{_LEFT + 90 * i + 18}" y="13">{rate} bit</text>'
        for i, rate in enumerate(rates)
    ]
    for row, (name, matrix) in enumerate(matrices.items(), 1):
        y, x = _ROW * row + 6, float(_LEFT)
        body.append(f'<text x="0" y="{y + 12}">{escape(name)}</text>')
        channels = sum(width for _, width in matrix.bands)
        for (rate, width), text in zip(matrix.bands, _band_texts(matrix, " channels"), strict=True):
            length = 400 * width / channels
            body.append(
                f'<rect class="r{rate}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="14">'
                f"<title>{escape(f'{name}: {text}')}</title></rect>"
            )
            x += length
    height = _ROW * (len(matrices) + 1) + 10
    return _svg("Bits of every matrix by band", _LEFT + 400, height, body)


def _sensitivity(matrices: Mapping[str, MatrixReport]) -> list[str]:
    alone = {n: m.alone for n, m in matrices.items() if m.alone is not None}
    if not alone:
        return ["<p>Not measured: the allocation was uniform.</p>"]
    logs = {name: log10(max(value, 1e-12)) for name, value in alone.items()}
    low, high = min(logs.values()), max(logs.values())
    strength = {n: 0.1 + 0.9 * (v - low) / ((high - low) or 1.0) for n, v in logs.items()}
    share = {
        n: sum(m.picture_share) / len(m.picture_share) for n, m in matrices.items() if n in alone
    }
    return [
        "<p>Divergence of the model, in nats an answer token, when this matrix alone is stored at "
        "the reference rate. Stronger is more; the scale is logarithmic.</p>",
        _heat_map(
            "Divergence of each matrix alone", strength, {n: f"{v:.2g}" for n, v in alone.items()}
        ),
        "<p>Share of the inputs' weighted energy that picture tokens bring, mean over the runs of "
        "channels; text tokens bring the rest.</p>",
        _heat_map(
            "Pictures' share of each input", share, {n: f"{v:.0%}" for n, v in share.items()}
        ),
    ]


def _heat_map(title: str, strength: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Draw layers from top to bottom, matrices of a layer from left to right."""
    places = {name: _place(name) for name in strength}
    layers = list(dict.fromkeys(layer for layer, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    body = [f'<text x="{120 + _CELL * i}" y="14">{escape(k)}</text>' for i, k in enumerate(kinds)]
    body += [f'<text x="0" y="{_ROW * i + 36}">{escape(k)}</text>' for i, k in enumerate(layers)]
    for name, (layer, kind) in places.items():
        x, y = 120 + _CELL * kinds.index(kind), 22 + _ROW * layers.index(layer)
        body.append(
            f'<rect class="heat" x="{x}" y="{y}" width="20" height="16" '
            f'opacity="{strength[name]:.2f}"/>'
            f'<rect class="cell" x="{x}" y="{y}" width="20" height="16"/>'
            f'<text x="{x + 25}" y="{y + 13}">{escape(labels[name])}</text>'
        )
    return _svg(title, 120 + _CELL * len(kinds), 30 + _ROW * len(layers), body)


def _place(name: str) -> tuple[str, str]:
    """Return a matrix's layer and its name within."""
    found = re.search(r"\.(\d+)\.", name)
    return (f"layer {found[1]}", name.rpartition(".")[2]) if found else ("", name)


def _svg(title: str, width: int, height: int, body: Iterable[str]) -> str:
    return (
        f'<figure><svg role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><title>{title}</title>' + "".join(body) + "</svg></figure>"
    )


def _matrix_table(matrices: Mapping[str, MatrixReport]) -> str:
    head = ["matrix", "bits/weight", "bands", "error nearest", "error rounded", "alone, nats"]
    rows = [
        [
            name,
            f"{m.bits_per_weight:.3f}",
            ", ".join(_band_texts(m)),
            f"{m.error_nearest:.5f}",
            f"{m.error:.5f}",
            "" if m.alone is None else f"{m.alone:.3g}",
        ]
        for name, m in matrices.items()
    ]
    if any(m.gate is not None for m in matrices.values()):
        head += ["rounding", "nats a conversation, to second order"]
        for row, m in zip(rows, matrices.values(), strict=True):
            row += ["", ""] if m.gate is None else [m.gate.rounding, _scores(m.gate)]
    return _table(head, rows)


def _band_texts(matrix: MatrixReport, noun: str = "") -> list[str]:
    """Say how wide each band is, of which class where classes were told apart, and its rate."""
    classes = [f" {name}" for name in matrix.classes] or [""] * len(matrix.bands)
    return [
        f"{width}{name}{noun} at {rate} bit"
        for (rate, width), name in zip(matrix.bands, classes, strict=True)
    ]


def _scores(gate: Verdict) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in gate.scores.items())


def _facts(facts: Mapping[str, Any]) -> str:
    return _table(("name", "value"), [(key, str(value)) for key, value in facts.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'
