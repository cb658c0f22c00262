"""A dense checkpoint folder in, an MGVQ checkpoint folder out (called by `cli`, `benchmarks`).

The order: read data, ask the dense model, which also answers what nobody has (`own_answers`),
measure what each matrix is sensitive to (`survey`) and spend the bits (`precision`), quantize
vision tower, embedding and decoder in the order in which data flows (`stream`), its blocks tuned
one by one (`block_tuning`), tune end to end (`tuning`), write. Finished matrices and blocks are
kept in `OUTPUT.partial/`, so an interrupted run goes on where it was; the same recipe, source and
data give the same tensors, interrupted or not.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mgvq_quantizer import questions, tuning
from mgvq_quantizer.allocation import MatrixPlan, dense_weights
from mgvq_quantizer.batches import (
    Features,
    decoder_runs,
    encode_pictures,
    evenly,
    length_batches,
    picture_batches,
    unique_pictures,
)
from mgvq_quantizer.block_tuning import BlockData, BlockTuned, BlockTuner, decoder_states
from mgvq_quantizer.dataset import Data, check_pictures, open_dense, read_data
from mgvq_quantizer.gate import Verdict
from mgvq_quantizer.original_blocks import OriginalBlocks
from mgvq_quantizer.own_answers import MAX_ANSWER_TOKENS, answer_open_questions
from mgvq_quantizer.planning import backward_batches, make_plans
from mgvq_quantizer.preflight import check, check_by_block
from mgvq_quantizer.recipe import ROUNDING_ONLY, TUNING_ONLY, QuantRecipe
from mgvq_quantizer.report import Report, make_report
from mgvq_quantizer.report_page import report_page
from mgvq_quantizer.residence import Residence
from mgvq_quantizer.sensitivity import Sensitivity
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.statistics import record_calls
from mgvq_quantizer.stream import Stream
from mgvq_quantizer.table_parts import measured_use, split_tables
from mgvq_quantizer.teacher import Reference, Student, ask_teacher, heldout_kl
from mgvq_quantizer.witness import Testimony
from mgvq_quantizer.work_folder import Work, WorkFolder, shared_folder
from mgvq_runtime import __version__
from mgvq_runtime.checkpoint.files import fingerprint_folder
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.checkpoint.spec import QuantizationSpec
from mgvq_runtime.checkpoint.writer import remove_leftovers, write_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.tokenizer.folder import missing_tokenizer_json

_NO_ANSWERS = (
    "{} holds {} questions without answers, and with --stream the model does not give them: "
    "sensitivity and the KL see the first token of each of these answers alone. Better: "
    "--calibration with conversations of the kind the model will be used for."
)
_COMPANIONS = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    questions.FILE_NAME,
)
"""Files of the source that a checkpoint needs to be self-contained, as patterns."""

SURVEYS, ROUNDED = "surveys", "rounded"
"""What runs share, by folder."""


@dataclass(frozen=True, eq=False)
class _Rounded:
    """Everything before tuning."""

    data: Data
    """With the model's own answers where there were none."""
    plans: dict[str, MatrixPlan]
    solutions: dict[str, Solution]
    features: Features
    """From the quantized vision tower."""
    reference: Reference
    sensitivities: list[Sensitivity]
    """Empty where the allocation is uniform."""
    verdicts: dict[str, Verdict]
    """Empty where every matrix is rounded in one way."""
    blocks: dict[str, BlockTuned]
    """Empty where blocks are left as rounded."""


def quantize(
    model: Path,
    output: Path,
    recipe: QuantRecipe,
    calibration_data: Path | None = None,
    device: str = "cpu",
    show_progress: bool = True,
    shared: Path | None = None,
    by_block: bool = False,
) -> Report:
    """Quantize a checkpoint folder.

    Args:
        model: a dense checkpoint folder.
        output: the folder to write; must not exist. `output` + ".partial" keeps unfinished work.
        recipe: settings.
        calibration_data: see `calibration.load_conversations`.
        device: where to compute.
        show_progress: draw a progress bar on stderr.
        shared: a folder where the survey (in `SURVEYS`) and the rounded matrices (in `ROUNDED`)
            are kept for other runs whose settings leave them as they are; None keeps nothing.
        by_block: keep one block of the model in memory at a time (two where candidates are tried in
            front of the blocks behind them); the result has the same bytes where the data have
            answers: those that they leave to the model are missing then.

    Returns:
        What was done; also written into the checkpoint as `quantization_report.json` and
        `.html`.

    Raises:
        CheckpointError: if the source cannot be used, the output exists or has no room.
        CalibrationError: if the data cannot be used.
        ConfigError: if the recipe asks for what cannot be done by block.
        ResumeError: if `output.partial` belongs to a run with other settings, or another process
            is at work in it.
    """
    started, output = time.monotonic(), output.absolute()  # "." has no name to add ".partial" to
    source = _open_source(model, output)
    check_by_block(recipe, by_block)
    residence = Residence(source, device, by_block)
    graph = residence.model
    unfinished = output.with_name(output.name + ".partial")
    check(graph, recipe, output, unfinished)
    data = read_data(model, graph, recipe, calibration_data)
    facts = _deciding_facts(recipe, model, data, device, by_block)
    if by_block and data.unanswered and show_progress:
        tqdm.write(_NO_ANSWERS.format(data.name, len(data.unanswered)), file=sys.stderr)
    # leave=None: below another bar, that of a comparison, it goes when it is done.
    bars = tqdm(unit="matrix", disable=not show_progress, leave=None)
    with contextlib.ExitStack() as held, bars as bar, torch.no_grad():
        own = held.enter_context(WorkFolder(unfinished, facts))
        work = Work(own, own) if shared is None else _shared_work(shared, facts, recipe, held)
        remove_leftovers(output)
        done = _round(residence, recipe, work, data, bar)
        tuned = _tune(graph, recipe, done, bar)
        report = _report(graph, recipe, done, tuned, started)
        _write(output, source, residence, done, tuned, recipe, report)
        own.remove()
    return report


def _deciding_facts(
    recipe: QuantRecipe, model: Path, data: Data, device: str, by_block: bool
) -> dict[str, Any]:
    """Return everything that decides the tensors."""
    facts = {
        **recipe.to_json(),
        "source": fingerprint_folder(model),
        "calibration": data.fingerprint,
        "calibration_tokens": data.digest,  # a changed template or preprocessor shows here
        "device": torch.device(device).type,  # others add up in another order
        "tool_version": __version__,
    }
    if data.unanswered:
        # What the model answers follows from the facts above; whether it is asked does not.
        facts["own_answer_tokens"] = 0 if by_block else MAX_ANSWER_TOKENS
    return facts


def _shared_work(
    folder: Path, facts: Mapping[str, Any], recipe: QuantRecipe, held: contextlib.ExitStack
) -> Work:
    """Open the folders of each stage, by the facts that decide it, for as long as `held` says."""
    rounding = {name: value for name, value in facts.items() if name not in TUNING_ONLY}
    measured = {name: value for name, value in rounding.items() if name not in ROUNDING_ONLY}
    measured |= {"rates": list(recipe.rates), "reference_rate": recipe.reference_rate}
    return Work(
        held.enter_context(shared_folder(folder / SURVEYS, measured)),
        held.enter_context(shared_folder(folder / ROUNDED, rounding)),
    )


def companions(folder: Path) -> list[Path]:
    """Return the files of a source folder that its checkpoint takes along."""
    files = {file for pattern in _COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(files)


def _open_source(model: Path, output: Path) -> Checkpoint:
    if output.exists():
        left = output.with_name(output.name + ".partial")
        rest = f"; it is whole, and {left} may be deleted" if left.exists() else ""
        raise CheckpointError(f"{output} exists: choose another --output, or delete it{rest}")
    return open_dense(model)


def _round(residence: Residence, recipe: QuantRecipe, work: Work, data: Data, bar: Any) -> _Rounded:
    """Ask the dense model, plan, then round every matrix; return what tuning needs."""
    graph = residence.model

    def done(name: str, solution: Solution) -> None:
        bar.update()
        bar.set_description(f"{name}, error {solution.error:.4f}")

    device = graph.device
    bar.set_description("asking the unquantized model")
    pictures = unique_pictures(data.train)
    check_pictures(data, graph)
    features = encode_pictures(graph, unique_pictures(data.all), device)
    if not residence.by_block:
        # Kept beside the survey, which is made of them: no run that shares it sees other answers.
        show = bar.set_description
        data = answer_open_questions(graph, data, features, recipe, work.survey, show)
        show("asking the unquantized model")
    reference = ask_teacher(graph, length_batches(data.all, device), features)
    drawn = length_batches(data.drawn(recipe), device)
    taught = ask_teacher(graph, drawn, features, reference)  # for tuning, which alone sees these
    tables = {}
    if recipe.has_row_parts:
        tables = split_tables(graph, measured_use(graph, reference, data.all), recipe)
    plans, weights, found = make_plans(
        graph, recipe, work.survey, data, features, reference, tables, bar
    )
    train = length_batches(data.train, device)
    stream = Stream(graph, plans, recipe, work.rounding, done, weights)
    shown = evenly(pictures, recipe.max_pictures)
    looking = list(picture_batches(shown))
    stream.share_books(looking, train, features, device, bar.set_description)
    originals = None
    if recipe.mismatch:
        calls = record_calls(graph.model.layers[0], decoder_runs(graph, train, features))
        originals = OriginalBlocks(calls)
    states = None
    if recipe.block_steps:
        states = decoder_states(graph, data.all, features)
    residence.settle(plans, stream.solutions)
    if any(name.startswith("visual.") for name in plans):
        stream.vision(looking, device)
    features = encode_pictures(graph, unique_pictures(data.all), device)
    stream.embedding(reference, length_batches(data.heldout, device), features)
    testimony = None
    if recipe.gated:
        asked = [backward_batches(part, device) for part in (data.train, data.heldout)]
        testimony = Testimony(asked[0], asked[1], features, reference)
    tuner = None
    if states is not None:
        blocks = BlockData(data.train, data.heldout, features, states)
        tuner = BlockTuner(graph, stream.plans, blocks, recipe, work.rounding, bar.set_description)
    stream.decoder(train, features, testimony, tuner, originals)
    did = stream.verdicts, stream.tuned_blocks
    return _Rounded(data, stream.plans, stream.solutions, features, taught, found, *did)


def _tune(graph: CausalLM, recipe: QuantRecipe, done: _Rounded, bar: Any) -> tuning.Tuned:
    """Tune end to end; without steps, only say how far the rounded model is from the original."""
    data = done.data
    if not recipe.tuning_steps:
        device = done.reference.head.device
        held = length_batches(data.heldout, device)
        kl = heldout_kl(Student(graph), {}, held, done.features, done.reference)
        return tuning.Tuned({}, {}, kl, kl, 0)
    with torch.enable_grad():
        return tuning.tune(
            graph,
            done.plans,
            {name: solution.weight for name, solution in done.solutions.items()},
            done.reference,
            (data.tuning_batches(recipe), data.heldout),
            done.features,
            recipe,
            bar.set_description,
        )


def _report(
    graph: CausalLM, recipe: QuantRecipe, done: _Rounded, tuned: tuning.Tuned, started: float
) -> Report:
    """Say what was done since a moment of the clock."""
    read = {**_facts(done.data), "answers": done.data.answers}
    said = read, time.monotonic() - started, done.sensitivities, done.verdicts
    report = make_report(done.plans, done.solutions, tuned, recipe, *said)
    return replace(report.with_kept(dense_weights(graph, done.plans)), blocks=done.blocks)


def _facts(data: Data) -> dict[str, Any]:
    """Return what a checkpoint says of its data; whose the answers are, its report says too."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "conversations": len(data.train),
        "heldout_conversations": len(data.heldout),
    }


def _write(
    output: Path,
    source: Checkpoint,
    residence: Residence,
    done: _Rounded,
    tuned: tuning.Tuned,
    recipe: QuantRecipe,
    report: Report,
) -> None:
    plans, solutions = done.plans, done.solutions
    quantization = QuantizationSpec(
        matrices={name: matrix.spec for name, matrix in plans.items()},
        bits_per_weight={"target": float(recipe.bits)},
        recipe=recipe.to_json(),
        calibration=_facts(done.data),
        tool_version=__version__,
        source_fingerprint=fingerprint_folder(source.path),
    )
    dense = (
        (name, tuned.parameters.get(name, parameter).half().cpu())
        for name, parameter in residence.parameters()
    )
    weights = ((n, tuned.weights.get(n, solutions[n].weight).to("cpu")) for n in plans)
    extra_files = {
        "quantization_report.json": report.to_bytes(),
        "quantization_report.html": report_page(report).encode(),
    }
    if (tokenizer := missing_tokenizer_json(source.path)) is not None:
        extra_files["tokenizer.json"] = tokenizer
    write_checkpoint(
        output,
        config=source.config,
        quantization=quantization,
        dense=dense,
        weights=weights,
        copy_files=companions(source.path),
        extra_files=extra_files,
    )
