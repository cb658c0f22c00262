"""The command `mgvq-eval compare` (called by `evaluate_cli`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mgvq_quantizer.baselines.bench import Options
from mgvq_quantizer.baselines.comparison import CHECKPOINT, compare
from mgvq_quantizer.baselines.methods import METHODS, find_methods
from mgvq_quantizer.baselines.ours import CHANGES, VARIANTS
from mgvq_quantizer.baselines.plot import plot, require_matplotlib
from mgvq_quantizer.baselines.rows import FILE_NAME
from mgvq_quantizer.baselines.tables import markdown
from mgvq_quantizer.flags import natural, positive
from mgvq_runtime.config import resolve_device
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import ConfigError, MgvqError

_RATES = (1.0, 8.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mgvq-eval compare`.

    Returns:
        The exit status: 0, 2 for what the user can put right, 130 after Ctrl-C.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        require_matplotlib()
        if parsed.num_threads is not None:
            torch.set_num_threads(parsed.num_threads)
        with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as bar:
            rows = compare(
                parsed.model,
                parsed.output,
                find_methods(parsed.methods.split(",")),
                read_rates(parsed.bits),
                parsed.seeds,
                [read_checkpoint(text) for text in parsed.checkpoint],
                Options(
                    calibration=parsed.calibration,
                    questions=parsed.questions,
                    limit=parsed.limit,
                    text=parsed.text,
                    max_samples=parsed.max_samples,
                    tuning_steps=tuple(parsed.tuning_steps),
                    device=resolve_device(parsed.device, torch.cuda.device_count()),
                    show_progress=True,
                ),
                bar.set_description_str,
            )
    except MgvqError as error:
        if debug_tracebacks():
            raise
        print(f"mgvq-eval: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nmgvq-eval: stopped. Finished rows lie in {parsed.output / FILE_NAME}; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        return 130
    table = markdown(rows)
    (parsed.output / "compare.md").write_text(table)
    plot(rows, parsed.output / "compare.png")
    print(table)
    print(f"written to {parsed.output}: {FILE_NAME}, compare.md, compare.png")
    return 0


def read_checkpoint(text: str) -> tuple[str, Path]:
    """Return label and folder of "LABEL=DIR" or "DIR"."""
    label, equals, folder = text.partition("=")
    return (label, Path(folder)) if equals else (CHECKPOINT, Path(text))


def read_rates(text: str) -> list[float]:
    """Return the rates of a list such as "2.0,2.25".

    Raises:
        ConfigError: if a part is no number from 1 to 8.
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--bits takes numbers with commas between, got {text!r}") from error
    for rate in rates:
        if not _RATES[0] <= rate <= _RATES[1]:
            raise ConfigError(f"--bits must lie between 1 and 8, got {rate:g}")
    return rates


def _parts() -> str:
    """List the parts of MGVQ, with the codec that alone has them where it is one."""
    words = []
    for part in CHANGES:
        with_lookups, with_trellis = (
            f"{whole}-{part}" in VARIANTS for whole in ("mgvq", "mgvq-trellis")
        )
        only = "" if with_lookups and with_trellis else "lookups" if with_lookups else "a trellis"
        words.append(f"{part} (with {only} alone)" if only else part)
    return ", ".join(words)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="mgvq-eval compare",
        description="Quantize a model's decoder with published methods and with MGVQ, whole or "
        "with a part changed, and compare them at the bits they really cost. Finished MGVQ "
        "checkpoints of the same model can stand beside them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="dense checkpoint folder")
    add("--output", type=Path, required=True, metavar="DIR", help="folder; finished rows are kept")
    add(
        "--methods",
        default=",".join([*METHODS, "mgvq"]),
        metavar="NAMES",
        help="with commas between; mgvq-PART is MGVQ with one part changed, mgvq-trellis and "
        "mgvq-trellis-PART the same with a trellis, 'mgvq-*' all of them; "
        f"parts: {_parts()} (default: %(default)s)",
    )
    add(
        "--bits",
        default="2.0,2.25,3.0",
        metavar="RATES",
        help="bits a weight in full, with commas between (default: %(default)s)",
    )
    add("--seeds", type=natural, nargs="+", default=[0], metavar="N", help="seeds (default: 0)")
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="[LABEL=]DIR",
        help="an MGVQ checkpoint of the model, as a row; may be repeated. Those of one label and "
        f"rate are averaged over their seeds (default label: {CHECKPOINT})",
    )
    add("--calibration", type=Path, metavar="FILE", help="as for mgvq-quantize")
    add(
        "--max-samples",
        type=positive,
        default=Options.max_samples,
        metavar="N",
        help="most calibration conversations (default: %(default)s)",
    )
    add("--questions", type=Path, metavar="FILE", help="as for mgvq-eval (default: the model's)")
    add("--text", type=Path, metavar="FILE", help="as for mgvq-eval, to be read too")
    add(
        "--limit", type=positive, metavar="N", help="most questions, drawn at random (default: all)"
    )
    add(
        "--tuning-steps",
        type=natural,
        nargs="+",
        default=[0],
        metavar="N",
        help="steps of end-to-end tuning for every quantizer, a row for each number (default: 0)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--num-threads", type=positive, metavar="N", help="CPU threads of torch")
    return parser
