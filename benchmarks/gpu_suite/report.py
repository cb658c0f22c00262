"""The result of a run as one JSON document and as Markdown (called by `__main__`).

Both are made from the journal alone, so a run that was cut short has its report too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.steps import Journal, Row, failures
from mgvq_kernels.tuned import slug

OURS = ("gemv", "gemm", "decode")
"""Our ways to multiply, as `vq_cases.LINEARS` names them: this file imports no kernel."""

LAYER_LINEARS = 4


def document(journal: Journal, minutes: float, interrupted: bool) -> dict[str, Any]:
    """Gather the journal into one document.

    Args:
        journal: what was run.
        minutes: the budget it was given.
        interrupted: whether it was stopped by hand.

    Returns:
        Device, results by kind, errors, dropped steps and seconds by step.
    """
    events = journal.events()
    rows: list[Row] = [event["row"] for event in events if event["event"] == "row"]
    ended = [event for event in events if event["event"] == "end"]
    by_kind = {
        kind: [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]
        for kind in ("device", "copy", "launch", "check", "linear", "op", "absent", "sanitizer")
    }
    copy = by_kind["copy"][0]["gb_s"] if by_kind["copy"] else None
    device = by_kind["device"][0] if by_kind["device"] else {}
    for row in by_kind["linear"] + by_kind["op"]:
        if copy is not None and row.get("gb_s") is not None:
            row["copy_share"] = round(row["gb_s"] / copy, 3)
    for row in by_kind["linear"]:
        rate = weights_a_clock(row, device)
        if rate is not None:
            row["weights_per_clock_and_multiprocessor"] = rate
    return {
        "benchmark": "gpu_suite",
        "minutes": minutes,
        "interrupted": interrupted,
        "device": device,
        "copy_gb_s": copy,
        **{k: by_kind[k] for k in ("launch", "check", "linear", "op", "absent", "sanitizer")},
        "errors": [{k: e[k] for k in ("step", "error")} for e in ended if e["error"] is not None],
        "dropped": [{k: e[k] for k in ("step", "why")} for e in events if e["event"] == "dropped"],
        "seconds": {event["step"]: event["seconds"] for event in ended},
    }


def weights_a_clock(row: Row, device: Row) -> float | None:
    """Say how many weights a multiprocessor decodes a clock, at the highest clock the GPU has."""
    megahertz = str(device.get("clocks.max.sm", ""))
    if row["us"] is None or not megahertz.isdigit():
        return None
    clocks = row["us"] * int(megahertz) * device["multiprocessors"]
    return round(row["shape"][0] * row["shape"][1] / clocks, 2)


def is_clean(result: dict[str, Any]) -> bool:
    """Say whether nothing raised and every check passed."""
    return not result["errors"] and not failures(result["check"] + result["sanitizer"])


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write `gpu_suite_<device>.json` and the Markdown beside it; returns the JSON's path."""
    name = result["device"].get("name", "no device")
    path = folder / f"gpu_suite_{slug(name)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(markdown(result)) + "\n")
    return path


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Tell the same in tables."""
    device = result["device"]
    yield f"# GPU suite: {device.get('name', 'no device')}\n"
    yield ", ".join(f"{key} {value}" for key, value in device.items() if key != "name") + ".\n"
    if result["copy_gb_s"] is not None:
        yield f"Copy bandwidth {result['copy_gb_s']} GB/s, bytes read and written.\n"
    for row in result["launch"]:
        yield f"{row['variant']}: {row['us']} us a graph node.\n"
    if result["interrupted"]:
        yield "**Stopped by hand: what follows is what was measured until then.**\n"
    yield from checks(result["check"])
    yield from layers(result["linear"])
    for model in dict.fromkeys(row["model"] for row in result["linear"]):
        yield from linears(model, [row for row in result["linear"] if row["model"] == model])
    yield from other_ops(result["op"])
    yield from notes("Absent", [(r["variant"], r["absent"]) for r in result["absent"]])
    yield from notes("Errors", [(r["step"], r["error"]) for r in result["errors"]])
    yield from notes("Dropped", [(r["step"], r["why"]) for r in result["dropped"]])
    verdicts = [(f"{r['tool']} {r['op']}", r["verdict"]) for r in result["sanitizer"]]
    yield from notes("Sanitizer", verdicts)


def checks(rows: Sequence[Row]) -> Iterator[str]:
    """One line an op: how many cases passed and how near the tolerance the worst came."""
    yield "## Correctness against float64\n"
    yield "| op | passed | worst error / tolerance |\n|---|---|---|"
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        shares = [r["error"] / r["tolerance"] for r in mine if r.get("error") and r["tolerance"]]
        passed = len(mine) - len(failures(mine))
        worst = f"{max(shares):.2f}" if shares else "0"
        yield f"| {op} | {passed} of {len(mine)} | {worst} |"
    yield ""
    for row in failures(rows):
        what = row.get("message") or f"error {row['error']:.3g}, at most {row['tolerance']:.3g}"
        yield f"- **{row['op']}** {row['variant']}: {what}"


def layers(rows: Sequence[Row]) -> Iterator[str]:
    """Add the four matrices of a layer up: ours by its best way, and each peer."""
    timed = [row for row in rows if row["us"] is not None]
    if not timed:
        return
    peers: dict[str, float] = {}  # and the bits a column is for: a trellis is timed at others too
    for row in timed:
        if not row["variant"].startswith(OURS):
            peers.setdefault(row["variant"], row["bits"])
    yield "## The linears of one decoder layer, us\n"
    yield f"| model | rows | ours, 2 bits | {' | '.join(peers)} |"
    yield "|---" * (3 + len(peers)) + "|"
    for model, count in dict.fromkeys((row["model"], row["rows"]) for row in timed):
        mine = [row for row in timed if (row["model"], row["rows"]) == (model, count)]
        ours = layer_us([row for row in mine if row["variant"] in OURS and row["bits"] == 2])
        cells = [
            layer_us([row for row in mine if (row["variant"], row["bits"]) == peer])
            for peer in peers.items()
        ]
        words = ["" if us is None else f"{us:.1f}" for us in (ours, *cells)]
        yield f"| {model} | {count} | {' | '.join(words)} |"
    yield ""


def layer_us(rows: Sequence[Row]) -> float | None:
    """Add the fastest time of each matrix; None unless all of a layer's were timed."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["linear"]] = min(row["us"], best.get(row["linear"], row["us"]))
    return sum(best.values()) if len(best) == LAYER_LINEARS else None


def linears(model: str, rows: Sequence[Row]) -> Iterator[str]:
    """One table a model: a line a matrix and variant, a column a row count."""
    counts = sorted({row["rows"] for row in rows})
    yield f"## {model}: us a call (share of copy bandwidth, by bytes of codes)\n"
    yield f"| matrix | bits | variant | {' | '.join(f'{n} rows' for n in counts)} |"
    yield "|---" * (3 + len(counts)) + "|"
    for key in dict.fromkeys(
        (r["linear"], r["bits"], r["variant"]) for r in sorted(rows, key=_order)
    ):
        mine = {r["rows"]: r for r in rows if (r["linear"], r["bits"], r["variant"]) == key}
        shape = "x".join(map(str, next(iter(mine.values()))["shape"]))
        cells = [_cell(mine.get(count)) for count in counts]
        yield f"| {key[0]} {shape} | {key[1]} | {key[2]} | {' | '.join(cells)} |"
    yield ""


def other_ops(rows: Sequence[Row]) -> Iterator[str]:
    """One line a timed case."""
    yield "## Other ops\n"
    yield "| op | case | us (share of copy bandwidth) |\n|---|---|---|"
    for row in rows:
        yield f"| {row['op']} | {row['variant']} | {_cell(row)} |"
    yield ""


def notes(title: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """List names and reasons, one line each."""
    if pairs:
        yield f"## {title}\n"
        for name, why in dict.fromkeys(pairs):
            yield f"- {name}: {' '.join(why.split())[:300]}"
        yield ""


def _order(row: Row) -> tuple[str, float]:
    return (row["linear"], row["bits"])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["us"] is None:
        return row["note"]
    share = row.get("copy_share")
    eager = " eager" if row["how"] == "eager" else ""
    return f"{row['us']}{eager}" + ("" if share is None else f" ({share:.0%})")
