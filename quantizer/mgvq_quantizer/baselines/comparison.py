"""Many quantizers on one model, side by side, a row at a time (called by `cli`).

A row is a baseline or MGVQ at a rate with a seed, or a finished MGVQ checkpoint; all are calibrated
on the same conversations (but the checkpoint) and asked the same questions. `rows` keeps finished
rows: a later run with the same model, calibration and questions adds to them. `tables` shows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mgvq_quantizer.baselines.bench import Bench, Options
from mgvq_quantizer.baselines.methods import Method
from mgvq_quantizer.baselines.ours import Variant
from mgvq_quantizer.baselines.rows import Comparison, Row, make_folder
from mgvq_quantizer.evaluate import bits_by_group
from mgvq_runtime.checkpoint.files import fingerprint_folder
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError

CHECKPOINT = "MGVQ checkpoint"
"""The label of a checkpoint that was given none."""
SCRATCH = "mgvq"
"""The folder in the output where our own runs work and keep their surveys."""


def compare(
    model: Path,
    output: Path,
    methods: Sequence[Method | Variant],
    bits: Sequence[float],
    seeds: Sequence[int],
    checkpoints: Sequence[tuple[str, Path]] = (),
    options: Options | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Run what is missing of a comparison.

    Args:
        model: a dense checkpoint folder.
        output: folder of the comparison; rows it has are kept.
        methods: baselines and variants of MGVQ to run.
        bits: rates to run each of them at.
        seeds: of each; a method without chance runs with the first one only.
        checkpoints: label and folder of MGVQ checkpoints of the same model, added as rows.
        options: data and device.
        progress: told what happens, in words.

    Returns:
        All rows of the folder, those of earlier runs first.

    Raises:
        CheckpointError: if a folder cannot be used or written.
        ConfigError: if two checkpoints have the same label, target and seed.
        DataError: if calibration data or questions cannot be used.
        ResumeError: if the folder belongs to a comparison of something else.
    """
    options = options or Options()
    make_folder(output)
    bench = Bench(model, output / SCRATCH, options, progress)
    comparison = Comparison(output, bench.facts)
    opened = [(label, open_checkpoint(path)) for label, path in checkpoints]
    ours = [(checkpoint, _checkpoint_row(label, checkpoint)) for label, checkpoint in opened]
    _check_distinct([row for _, row in ours])
    for checkpoint, row in ours:
        if not comparison.has(row):
            progress(f"{checkpoint.path}: asking questions")
            comparison.add(bench.run_checkpoint(checkpoint, row))
    for method, rows in _jobs(methods, bits, seeds, sorted(set(options.tuning_steps))):
        wanted = [bench.with_recipe(method, row) for row in rows]
        missing = [row for row in wanted if not comparison.has(row)]
        for row in bench.run(method, missing) if missing else ():
            comparison.add(row)
    return comparison.rows


def _jobs(
    methods: Sequence[Method | Variant],
    bits: Sequence[float],
    seeds: Sequence[int],
    tuning_steps: Sequence[int],
) -> Iterator[tuple[Method | Variant, list[Row]]]:
    """Yield what is to be run, with the rows it will fill."""
    for target, method in itertools.product(bits, methods):
        for seed in seeds if method.is_random else seeds[:1]:
            yield (
                method,
                [
                    Row(
                        method.label + (f", tuned {steps} steps" if steps else ""),
                        target,
                        seed,
                        tuning_steps=steps,
                        is_ours=isinstance(method, Variant),
                    )
                    for steps in tuning_steps
                ],
            )


def _check_distinct(rows: Sequence[Row]) -> None:
    """Refuse checkpoints that would take each other's place."""
    for row, other in itertools.combinations(rows, 2):
        if row.key == other.key:
            raise ConfigError(
                f"{row.source} and {other.source} are both {row.label!r} at {row.target:g} bits "
                f"with seed {row.seed}: tell them apart with --checkpoint LABEL=DIR"
            )


def _checkpoint_row(label: str, opened: Checkpoint) -> Row:
    """Return the row of an MGVQ checkpoint, before it is examined."""
    if opened.quantization is None:
        raise CheckpointError(f"{opened.path} is not quantized: --checkpoint takes MGVQ folders")
    bits = bits_by_group(opened)
    recipe = opened.quantization.recipe
    return Row(
        label,
        float(opened.quantization.bits_per_weight.get("target", bits["decoder"])),
        int(recipe.get("seed", 0)),
        source=f"{opened.path.name} {fingerprint_folder(opened.path)}",
        bits_per_weight=bits["decoder"],
        quantized=", ".join(group for group in sorted(bits) if group != "total"),
        tuning_steps=int(recipe.get("tuning_steps", 0)),
        is_ours=True,
    )
