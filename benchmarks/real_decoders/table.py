"""SmolLM2-135M-Instruct at several sizes, beside its fp16 original; run by people.

    python -m benchmarks.real_decoders.table FOLDER            # hours on a processor
    python -m benchmarks.real_decoders.table FOLDER --only 44  # one size

Fetches and converts the model, gathers calibration and evaluation text, quantizes, evaluates, and
rewrites `benchmarks/results/smollm2.json` and the table in this folder's README. Whatever is in
FOLDER already is used: a run that was stopped goes on. Not here: the model (`smollm2`), where text
comes from (`texts`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.real_decoders import smollm2
from benchmarks.real_decoders.texts import write_calibration, write_evaluation
from mgvq_quantizer.evaluate_text import evaluate_text
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe

RESULTS = Path(__file__).parents[1] / "results" / "smollm2.json"
README = Path(__file__).parent / "README.md"
_COMMON = QuantRecipe(
    codec="trellis",
    survey_bits=2.5,
    max_samples=56,
    guided=True,
    draw_out=0.0,
    tuning_steps=30,
    tuning_batch_tokens=512,
    codebook_lr=2e-3,
    scale_lr=1e-3,
)
"""Steps as cheap as they come, and one survey for all sizes."""
RECIPES: Mapping[str, QuantRecipe] = {
    "44": dataclasses.replace(_COMMON, bits=2.68, embedding_bits=2.3),
    "56": dataclasses.replace(_COMMON, bits=3.385, embedding_bits=3.05),
    "68": dataclasses.replace(_COMMON, bits=4.155, embedding_bits=3.55, tuning_steps=0),
}
"""By megabytes (10^6 bytes) of the whole weight file."""
_OF_ANSWERS = ("kl", "kl_se", "top1_agreement", "n", "n_tokens")
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)


def run(folder: Path, size: str) -> dict[str, Any]:
    """Quantize to one size and evaluate, or as much of it as is not done yet; return the row."""
    output, row_file = folder / f"{size}mb", folder / f"{size}mb.json"
    if row_file.exists():
        row: dict[str, Any] = json.loads(row_file.read_text())
        return row
    recipe = RECIPES[size]
    model = folder / "smollm2"
    started = time.process_time()
    if not output.exists():
        quantize(model, output, recipe, folder / "calibration", shared=folder / "shared")
    spent = time.process_time() - started
    report = json.loads((output / "quantization_report.json").read_text())
    found = evaluate_text(output, model, folder / "austen.txt")
    answers = evaluate_text(output, model, folder / "conversations.jsonl")
    row = {
        "size": size,
        "recipe": recipe.to_json(),
        **dataclasses.asdict(found),
        "answers": {name: getattr(answers, name) for name in _OF_ANSWERS},
        "kl_heldout_rounded": report["kl_rounded"],
        "kl_heldout": report["kl"],
        "tuning_steps_kept": report["tuning_steps_kept"],
        "quantize_processor_seconds": round(spent),
        "quantize_seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }
    row_file.write_text(json.dumps(row, indent=1) + "\n")
    return row


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the markdown table of what was run to its end."""
    lines = [
        "| MB | bits decoder / embedding | KL | same first choice | perplexity (original) | KL of "
        "answers | tuning steps | processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        bits, answers = row["bits_per_weight_by_group"], row["answers"]
        lines.append(
            f"| {row['file_bytes'] / 1e6:.1f} | {bits['decoder']:.2f} / {bits['embedding']:.2f} "
            f"| {row['kl']:.3f} ± {row['kl_se']:.3f} | {row['top1_agreement']:.1%} "
            f"| {row['perplexity']:.2f} ({row['reference_perplexity']:.2f}) "
            f"| {answers['kl']:.3f} ± {answers['kl_se']:.3f} "
            f"| {row['recipe']['tuning_steps']} of {row['recipe']['tuning_batch_tokens']} tokens "
            f"| {row['quantize_processor_seconds'] / 60:.0f} min |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Quantize SmolLM2-135M-Instruct to three sizes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", choices=list(RECIPES), help="one size; the others stay as they are"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    model = folder / "smollm2"
    if not (model / "config.json").exists():
        smollm2.make(model)
    write_calibration(folder / "calibration", folder / "downloads")
    write_evaluation(folder / "austen.txt", folder / "conversations.jsonl", folder / "downloads")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for size in [arguments.only] if arguments.only else RECIPES:
        rows[size] = run(folder, size)
        ordered = {name: rows[name] for name in RECIPES if name in rows}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        README.write_text(_TABLE.sub(rf"\1{table(ordered)}\n\2", README.read_text()))
        print(table(ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
