"""The command `mgvq-quantize`: flags from the recipe's fields, progress, a table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.config import field_docs, resolve_device
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import MgvqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mgvq-quantize`.

    Returns:
        The exit status: 0, 2 for what the user can put right, 130 after Ctrl-C.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        recipe = recipe_from_arguments(parsed)
        device = resolve_device(parsed.device, torch.cuda.device_count())
        if parsed.num_threads is not None:
            torch.set_num_threads(parsed.num_threads)
        report = quantize(parsed.model, parsed.output, recipe, parsed.calibration, device)
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
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="LLaVA conversations (.jsonl, .json or .zip with the pictures), or a folder of them "
        "or of pictures (default: the model's own calibration.zip, else the bundled pictures)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of torch")
    group = parser.add_argument_group("recipe")
    docs = field_docs(QuantRecipe)
    for field in dataclasses.fields(QuantRecipe):
        flag = "--" + field.name.replace("_", "-")
        shown = "" if field.default is None else f" (default: {field.default})"
        text = (docs[field.name].rstrip(".") + shown).replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=text
            )
        else:
            kind = int if field.default is None else type(field.default)
            kind = float if field.name.endswith("bits") else kind
            metavar = "X" if kind is float else "N"
            group.add_argument(flag, type=kind, default=field.default, metavar=metavar, help=text)
    return parser


def recipe_from_arguments(parsed: argparse.Namespace) -> QuantRecipe:
    """Return the recipe that the flags say.

    Raises:
        ConfigError: if a value is out of range; fractional rates are refused by name.
    """
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(QuantRecipe)}
    for name in ("bits", "vision_bits", "embedding_bits"):
        if float(values[name]).is_integer():
            values[name] = int(values[name])
    return QuantRecipe(**values)


if __name__ == "__main__":
    raise SystemExit(main())
