"""What the rows of a comparison share, and how one row is run (called by `comparison`).

Every row is calibrated on the same conversations and asked the same questions. Not here: which rows
there are, where finished ones are kept (`rows`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mgvq_quantizer.archive import Archive, DataError
from mgvq_quantizer.baselines.interface import Fisher, NotDefined, Quantized
from mgvq_quantizer.baselines.methods import Method
from mgvq_quantizer.baselines.ours import Variant, all_but_the_decoder
from mgvq_quantizer.baselines.rows import Row
from mgvq_quantizer.baselines.through_model import bits_per_weight, fishers_of, quantize_decoder
from mgvq_quantizer.baselines.tuned import tune_decoder
from mgvq_quantizer.batches import TokenBatch, encode_pictures, length_batches, unique_pictures
from mgvq_quantizer.dataset import Data, open_dense, read_data
from mgvq_quantizer.evaluate import Examiner, bits_by_group, to_dense
from mgvq_quantizer.evaluate_text import TextExaminer
from mgvq_quantizer.own_answers import answer_open_questions
from mgvq_quantizer.pipeline import ROUNDED, quantize
from mgvq_quantizer.questions import find_questions
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Reference, ask_teacher
from mgvq_runtime import __version__
from mgvq_runtime.checkpoint.files import fingerprint_folder
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.multimodal.chat import ChatProcessor


@dataclass(frozen=True)
class Options:
    """What rows are calibrated on and asked, and where."""

    calibration: Path | None = None
    questions: Path | None = None
    limit: int | None = None
    """Most questions."""
    max_samples: int = QuantRecipe.max_samples
    """Most calibration conversations."""
    tuning_steps: tuple[int, ...] = (0,)
    """Steps of end-to-end tuning that every quantizer gets, a row for each number."""
    text: Path | None = None
    """Plain text to be read too; it is enough where there are no questions."""
    device: str = "cpu"
    show_progress: bool = False
    """Draw bars of our own matrices, of questions and of windows of text on stderr."""


class Bench:
    """A dense model with everything that rows share, made once."""

    def __init__(
        self, model: Path, scratch: Path, options: Options, progress: Callable[[str], None]
    ) -> None:
        """Read calibration data, questions and text.

        Args:
            model: a dense checkpoint folder.
            scratch: folder for MGVQ checkpoints while they are examined and for what their runs
                share, of which the surveys stay; made when it is needed.
            options: data and device.
            progress: told what happens, in words.

        Raises:
            CheckpointError: if the model cannot be used.
            DataError: if calibration data, questions or text cannot be used, or there are neither
                questions nor text.
        """
        self._source = open_dense(model)
        self._scratch, self._calibration = scratch, options.calibration
        self._device, self._progress = options.device, progress
        self._show_progress = shown = options.show_progress
        graph = self._dense()
        self._recipe = QuantRecipe(
            tuning_steps=max(options.tuning_steps),
            max_samples=options.max_samples,
            keep=all_but_the_decoder(graph),
        )
        data = read_data(model, graph, self._recipe, options.calibration)
        questions, device = _find_questions(model, options), options.device
        self._examiner = self._reader = None
        if questions is not None:
            archive = Archive(questions)
            self._examiner = Examiner(model, archive, options.limit, 0, device, shown)
        if options.text is not None:
            dense = self._examiner.reference if self._examiner else graph
            processor = ChatProcessor.from_checkpoint(self._source, graph.config)
            self._reader = TextExaminer(dense, processor, options.text, show_progress=shown)
        self.facts = {
            "model": model.name,
            "model_fingerprint": fingerprint_folder(model),
            "calibration": data.name,
            "calibration_fingerprint": data.fingerprint,
            "max_samples": options.max_samples,
            "questions": questions.name if questions else None,
            "limit": options.limit,
            "questions_fingerprint": self._examiner.fingerprint if self._examiner else None,
            "text_fingerprint": self._reader.fingerprint if self._reader else None,
            "tool_version": __version__,
        }
        self._features = encode_pictures(graph, unique_pictures(data.all), options.device)
        self._read = data
        self._fishers: dict[str, Fisher] = {}
        self._reference: Reference | None = None

    @functools.cached_property
    def _data(self) -> Data:
        """What baselines are calibrated on: with the answers that our own rows have, too."""
        if not self._read.unanswered:
            return self._read
        asked = self._dense(), self._read, self._features, self._recipe, None, self._progress
        return answer_open_questions(*asked)

    @functools.cached_property
    def _batches(self) -> list[TokenBatch]:
        return length_batches(self._data.train, torch.device(self._device))

    def run(self, method: Method | Variant, rows: Sequence[Row]) -> Iterator[Row]:
        """Run one quantizer at one rate with one seed.

        Args:
            method: the quantizer.
            rows: to be filled, at least one; they differ in their tuning steps.

        Yields:
            The rows, filled.
        """
        if isinstance(method, Variant):
            for row in rows:
                yield self._run_variant(method, row)
            shutil.rmtree(self._scratch / ROUNDED, ignore_errors=True)
        else:
            yield from self._run_baseline(method, rows)

    def _run_baseline(self, method: Method, rows: Sequence[Row]) -> Iterator[Row]:
        """Quantize a fresh model once; tune copies of it."""
        row = rows[0]
        what = f"{method.name} at {row.target:g} bits, seed {row.seed}"
        clock = _Clock()
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
            yield from (dataclasses.replace(row, undefined=str(error)) for row in rows)
            return
        for row in rows:
            model = graph
            if row.tuning_steps:
                model = copy.deepcopy(graph)
                self._tune(model, results, row, lambda text: self._progress(f"{what}: {text}"))
            self._progress(f"{what}: asking questions")
            bits = bits_per_weight(results)
            yield clock.stop(self._examine(model, dataclasses.replace(row, bits_per_weight=bits)))
            clock = _Clock()

    def with_recipe(self, method: Method | Variant, row: Row) -> Row:
        """Return a row of MGVQ with the digest of its settings; others and undefined ones as is."""
        if not isinstance(method, Variant):
            return row
        try:
            settings = self._recipe_of(method, row).to_json()
        except ConfigError:
            return row
        words = json.dumps(settings, sort_keys=True).encode()
        return dataclasses.replace(row, recipe=hashlib.blake2b(words, digest_size=6).hexdigest())

    def _recipe_of(self, variant: Variant, row: Row) -> QuantRecipe:
        return dataclasses.replace(
            self._recipe,
            bits=row.target,
            seed=row.seed,
            tuning_steps=row.tuning_steps,
            **variant.settings,
        )

    def _run_variant(self, variant: Variant, row: Row) -> Row:
        """Quantize with our own pipeline, decoder only, and examine the checkpoint it writes.

        Rows that differ in tuning alone share the rounded matrices, rows that are surveyed alike
        the survey.
        """
        what = f"{variant.name} at {row.target:g} bits, seed {row.seed}"
        self._progress(what)
        clock = _Clock()
        folder = self._scratch / f"{variant.name}-{row.target:g}-{row.seed}-{row.tuning_steps}"
        try:
            recipe = self._recipe_of(variant, row)
            if not _was_made_with(folder, recipe):  # before an interruption
                shutil.rmtree(folder, ignore_errors=True)
                quantize(
                    self._source.path,
                    folder,
                    recipe,
                    self._calibration,
                    self._device,
                    self._show_progress,
                    shared=self._scratch,
                )
        except ConfigError as error:
            self._progress(f"{what}: not defined")
            shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
            return dataclasses.replace(row, undefined=str(error))
        self._progress(f"{what}: asking questions")
        opened = open_checkpoint(folder)
        row = dataclasses.replace(row, bits_per_weight=bits_by_group(opened)["decoder"])
        row = self._examine(to_dense(fill_model(opened, self._device)), row)
        shutil.rmtree(folder)
        return clock.stop(row)

    def run_checkpoint(self, opened: Checkpoint, row: Row) -> Row:
        """Examine an MGVQ checkpoint."""
        clock = _Clock()
        return clock.stop(self._examine(to_dense(fill_model(opened, self._device)), row))

    def _examine(self, model: CausalLM, row: Row) -> Row:
        """Ask the questions, let the text be read; return the row with what came of it."""
        return dataclasses.replace(
            row,
            marks=self._examiner.examine(model) if self._examiner else None,
            text=self._reader.examine(model) if self._reader else None,
        )

    def _tune(
        self,
        graph: CausalLM,
        results: Mapping[str, Quantized],
        row: Row,
        progress: Callable[[str], None],
    ) -> None:
        """Tune a quantized decoder against the dense model, which is asked once."""
        data = self._data
        if self._reference is None:
            samples, device = [*data.all, *data.swapped], self._batches[0].token_ids.device
            everything = length_batches(samples, device)
            with torch.no_grad():
                self._reference = ask_teacher(self._dense(), everything, self._features)
        recipe = dataclasses.replace(self._recipe, seed=row.seed, tuning_steps=row.tuning_steps)
        shown = data.tuning_batches(recipe), data.heldout
        tune_decoder(graph, results, self._reference, shown, self._features, recipe, progress)

    def _dense(self) -> CausalLM:
        return fill_model(self._source, self._device)


def _find_questions(model: Path, options: Options) -> Path | None:
    """Return the question file, or None where a text has to do because the model brings none."""
    try:
        return find_questions(options.questions, [model])
    except DataError:
        if options.questions is not None or options.text is None:
            raise
        return None


def _was_made_with(folder: Path, recipe: QuantRecipe) -> bool:
    """Say whether a folder is a whole checkpoint of these settings."""
    if not folder.exists():
        return False
    try:
        quantization = open_checkpoint(folder).quantization
    except CheckpointError:  # its deletion was interrupted
        return False
    return quantization is not None and dict(quantization.recipe) == recipe.to_json()


class _Clock:
    """Measures a row."""

    def __init__(self) -> None:
        self._started = time.monotonic(), time.process_time()

    def stop(self, row: Row) -> Row:
        """Return the row with what it took."""
        wall, processor = self._started
        return dataclasses.replace(
            row,
            seconds=time.monotonic() - wall,
            processor_seconds=time.process_time() - processor,
        )
