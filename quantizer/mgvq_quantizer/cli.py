"""The command `mgvq-quantize`: flags from the recipe's fields, progress, a table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mgvq_quantizer.flags import positive
from mgvq_quantizer.forecast import forecast
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import PRESETS, QuantRecipe, make_recipe, setting_type
from mgvq_runtime.config import field_docs, resolve_device
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import MgvqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mgvq-quantize`.

    Returns:
        The exit status: 0, 2 for what the user can put right, 130 after Ctrl-C.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.output is None and not parsed.plan:
        parser.error("the following arguments are required: --output")
    if parsed.json and not parsed.plan:
        parser.error("--json belongs to --plan")
    try:
        recipe = recipe_from_arguments(parsed)
        device = resolve_device(parsed.device, torch.cuda.device_count())
        if parsed.num_threads is not None:
            torch.set_num_threads(parsed.num_threads)
        if parsed.plan:
            planned = forecast(parsed.model, recipe, parsed.calibration, device, parsed.stream)
            print(planned.to_json() if parsed.json else "\n".join(planned.lines()))
            return 0
        report = quantize(
            parsed.model,
            parsed.output,
            recipe,
            parsed.calibration,
            device,
            by_block=parsed.stream,
        )
    except MgvqError as error:
        if debug_tracebacks():
            raise
        print(f"mgvq-quantize: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nmgvq-quantize: stopped. What is finished lies in {parsed.output}.partial; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        return 130
    print(report.table())
    print(f"written to {parsed.output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every recipe field is a flag, with the field's default and docstring."""
    parser = argparse.ArgumentParser(
        prog="mgvq-quantize",
        description="Quantize a Hugging Face vision-language checkpoint to an MGVQ checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="dense checkpoint folder"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="load and write nothing: print the time, memory and disk that the run would take; a "
        "folder with config.json alone will do",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON line")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="LLaVA conversations (.jsonl, .json or .zip with the pictures), plain text (.txt), or "
        "a folder of them or of pictures, about which the model itself answers generic questions "
        "(default: the model's own calibration.zip, else the bundled pictures)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--num-threads", type=positive, metavar="N", help="CPU threads of torch")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read blocks from the shards as they are needed, for a model larger than memory: the "
        "same checkpoint, one block or two in memory at a time; without end-to-end tuning, and "
        "without the model's own answers where the data have none",
    )
    group = parser.add_argument_group("recipe", "flags change the file, the file the preset")
    group.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="a set of settings"
    )
    group.add_argument("--recipe", type=Path, metavar="FILE", help="settings in a TOML file")
    docs = field_docs(QuantRecipe)
    for field in dataclasses.fields(QuantRecipe):
        flag = "--" + field.name.replace("_", "-")
        shown = "" if field.default in (None, "") else f" (default: {field.default})"
        text = (docs[field.name].rstrip(".") + shown).replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            kind = setting_type(field)
            metavar = {float: "X", int: "N"}.get(kind, "NAME")
            group.add_argument(
                flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text
            )
    return parser


def recipe_from_arguments(parsed: argparse.Namespace) -> QuantRecipe:
    """Return the recipe that preset, file and flags say.

    Raises:
        ConfigError: if a value is out of range, or the file does not fit.
    """
    given = vars(parsed)
    names = (field.name for field in dataclasses.fields(QuantRecipe))
    settings = {name: given[name] for name in names if name in given}
    return make_recipe(parsed.preset, parsed.recipe, settings)


if __name__ == "__main__":
    raise SystemExit(main())
