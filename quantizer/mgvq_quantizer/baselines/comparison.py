"""Many quantizers on one model, side by side, a row at a time (called by `cli`).

A row is a baseline at a rate with a seed, or an MGVQ checkpoint; all are calibrated on the same
conversations and asked the same questions. `compare.json` in the output folder keeps finished rows:
a later run with the same model, calibration and questions adds to them. `tables` shows them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgvq_quantizer.archive import Archive
from mgvq_quantizer.baselines.interface import Fisher, NotDefined, Quantized
from mgvq_quantizer.baselines.methods import Method
from mgvq_quantizer.baselines.through_model import bits_per_weight, fishers_of, quantize_decoder
from mgvq_quantizer.baselines.tuned import tune_decoder
from mgvq_quantizer.batches import encode_pictures, length_batches, unique_pictures
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.evaluate import Examiner, Marks, bits_by_group, to_dense
from mgvq_quantizer.questions import find_questions
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Reference, ask_teacher
from mgvq_quantizer.work_folder import ResumeError
from mgvq_runtime import __version__
from mgvq_runtime.checkpoint.files import fingerprint_folder
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model

FILE_NAME = "compare.json"
OURS = "MGVQ"
"""The label of a checkpoint that was given none."""


@dataclass(frozen=True)
class Options:
    """What rows are calibrated on and asked, and where."""

    calibration: Path | None = None
    questions: Path | None = None
    limit: int | None = None
    """Most questions."""
    tuning_steps: int = 0
    """Steps of end-to-end tuning that every baseline gets; its rows are labelled so."""
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One quantizer at one rate with one seed, and what became of the model."""

    label: str
    """What tables and plots call the quantizer; rows of one label and target are averaged."""
    target: float
    """Bits a weight that were asked for."""
    seed: int
    source: str | None = None
    """The folder of an MGVQ checkpoint, with its fingerprint."""
    undefined: str | None = None
    """Why there is nothing to measure."""
    bits_per_weight: float | None = None
    """Of the decoder's matrices, in full."""
    quantized: str = "decoder"
    """Which groups of matrices were quantized."""
    marks: Marks | None = None
    seconds: float = 0.0
    """Quantization and examination; of a checkpoint, the examination alone."""

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells rows apart."""
        return (self.label, self.target, self.seed)


class Comparison:
    """The rows of an output folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            folder: where `compare.json` is, or will be.
            facts: what all rows have in common. JSON values.

        Raises:
            ResumeError: if the folder holds rows of a comparison with other facts.
        """
        self._file, self.facts = folder / FILE_NAME, dict(facts)
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._read()

    def has(self, row: Row) -> bool:
        """Return whether a row is finished; one of another checkpoint does not count."""
        return any((old.key, old.source) == (row.key, row.source) for old in self.rows)

    def add(self, row: Row) -> None:
        """Keep a finished row, on disk too; it takes the place of one with the same key."""
        self.rows = [*(old for old in self.rows if old.key != row.key), row]
        content = {"facts": self.facts, "rows": [dataclasses.asdict(row) for row in self.rows]}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self._file)

    def _read(self) -> None:
        try:
            content = json.loads(self._file.read_text())
            old = content["facts"]
            self.rows = [_row(values) for values in content["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self._file} cannot be read ({error}): delete it") from error
        for key in sorted({*old, *self.facts}):
            if old.get(key) != self.facts.get(key):
                raise ResumeError(
                    f"{self._file} holds rows with {key} = {old.get(key)!r}, this run has "
                    f"{self.facts.get(key)!r}: use the same, or another --output"
                )


def compare(
    model: Path,
    output: Path,
    methods: Sequence[Method],
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
        methods: baselines to run.
        bits: rates to run each of them at.
        seeds: of each; a method without chance runs with the first one only.
        checkpoints: label and folder of MGVQ checkpoints of the same model, added as rows.
        options: data and device.
        progress: told what happens, in words.

    Returns:
        All rows of the folder, those of earlier runs first.

    Raises:
        CheckpointError: if a folder cannot be used.
        ConfigError: if two checkpoints have the same label, target and seed.
        DataError: if calibration data or questions cannot be used.
        ResumeError: if the folder belongs to a comparison of something else.
    """
    options = options or Options()
    bench = _Bench(model, options, progress)
    tuned = f", tuned {options.tuning_steps} steps" if options.tuning_steps else ""
    comparison = Comparison(output, bench.facts)
    opened = [(label, open_checkpoint(path)) for label, path in checkpoints]
    ours = [(checkpoint, _checkpoint_row(label, checkpoint)) for label, checkpoint in opened]
    _check_distinct([row for _, row in ours])
    theirs = [
        (method, Row(method.label + tuned, target, seed))
        for target in bits
        for method in methods
        for seed in (seeds if method.is_random else seeds[:1])
    ]
    for checkpoint, row in ours:
        if not comparison.has(row):
            progress(f"{checkpoint.path}: asking questions")
            comparison.add(bench.run_checkpoint(checkpoint, row))
    for method, row in theirs:
        if not comparison.has(row):
            comparison.add(bench.run(method, row))
    return comparison.rows


class _Bench:
    """A dense model with everything that rows share, made once."""

    def __init__(self, model: Path, options: Options, progress: Callable[[str], None]) -> None:
        self._source = open_checkpoint(model)
        if self._source.quantization is not None:
            raise CheckpointError(f"{model} is quantized already: give the original checkpoint")
        self._device, self._progress = options.device, progress
        graph = self._dense()
        self._recipe = QuantRecipe(tuning_steps=options.tuning_steps)
        data = read_data(model, graph, self._recipe, options.calibration)
        questions = find_questions(options.questions, [model])
        self._examiner = Examiner(
            model, Archive(questions), options.limit, 0, options.device, show_progress=False
        )
        self.facts = {
            "model": model.name,
            "model_fingerprint": fingerprint_folder(model),
            "calibration": data.name,
            "calibration_fingerprint": data.fingerprint,
            "questions": questions.name,
            "limit": options.limit,
            "questions_fingerprint": self._examiner.fingerprint,
            "tool_version": __version__,
        }
        self._data = data
        self._features = encode_pictures(graph, unique_pictures(data.all), options.device)
        self._batches = length_batches(data.train, next(graph.parameters()).device)
        self._fishers: dict[str, Fisher] = {}
        self._reference: Reference | None = None

    def run(self, method: Method, row: Row) -> Row:
        """Quantize a fresh model and examine it."""
        what = f"{method.name} at {row.target:g} bits, seed {row.seed}"
        started = time.monotonic()
        graph = self._dense()
        if method.needs_fisher and not self._fishers:
            self._progress("gradients of the calibration answers")
            self._fishers = fishers_of(graph, self._data.train, self._features)
        try:
            results = quantize_decoder(
                graph,
                method.quantize,
                row.target,
                row.seed,
                self._batches,
                self._features,
                self._fishers if method.needs_fisher else {},
                lambda name: self._progress(f"{what}: {name}"),
            )
        except NotDefined as error:
            self._progress(f"{what}: not defined")
            return dataclasses.replace(row, undefined=str(error))
        if self._recipe.tuning_steps:
            self._tune(graph, results, lambda text: self._progress(f"{what}: {text}"))
        self._progress(f"{what}: asking questions")
        return dataclasses.replace(
            row,
            bits_per_weight=bits_per_weight(results),
            marks=self._examiner.examine(graph),
            seconds=time.monotonic() - started,
        )

    def run_checkpoint(self, opened: Checkpoint, row: Row) -> Row:
        """Examine an MGVQ checkpoint."""
        started = time.monotonic()
        marks = self._examiner.examine(to_dense(fill_model(opened, self._device)))
        return dataclasses.replace(row, marks=marks, seconds=time.monotonic() - started)

    def _tune(
        self, graph: CausalLM, results: Mapping[str, Quantized], progress: Callable[[str], None]
    ) -> None:
        """Tune a quantized decoder against the dense model, which is asked once."""
        data = self._data
        if self._reference is None:
            everything = length_batches(data.all, self._batches[0].token_ids.device)
            with torch.no_grad():
                self._reference, _ = ask_teacher(self._dense(), everything, self._features)
        samples = ([*data.train, *data.swapped], data.heldout)
        tune_decoder(
            graph, results, self._reference, samples, self._features, self._recipe, progress
        )

    def _dense(self) -> CausalLM:
        return fill_model(self._source, self._device)


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
    )


def _row(values: dict[str, Any]) -> Row:
    marks = values.pop("marks")
    return Row(**values, marks=None if marks is None else Marks(**marks))
