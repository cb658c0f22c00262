"""A dense checkpoint folder in, an MGVQ checkpoint folder out (called by `cli`, `benchmarks`).

The order: read data, ask the dense model, measure what each matrix is sensitive to (`survey`) and
spend the bits (`precision`), quantize vision tower, embedding and decoder in the order in which
data flows (`stream`), tune end to end (`tuning`), write. Finished matrices are kept in
`OUTPUT.partial/`, so an interrupted run goes on where it was; the same recipe, source and data give
the same tensors, interrupted or not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mgvq_quantizer import questions, tuning
from mgvq_quantizer.allocation import MatrixPlan, dense_weights, plan
from mgvq_quantizer.batches import (
    Features,
    TokenBatch,
    decoder_runs,
    encode_pictures,
    length_batches,
    make_batch,
    picture_batches,
    split_batches,
    unique_pictures,
)
from mgvq_quantizer.calibration import CalibrationError, Sample
from mgvq_quantizer.dataset import Data, read_data
from mgvq_quantizer.gate import Verdict
from mgvq_quantizer.gradients import TokenWeights, squared_gradients, token_weights
from mgvq_quantizer.precision import choose_bands
from mgvq_quantizer.recipe import ROUNDING_ONLY, TUNING_ONLY, QuantRecipe
from mgvq_quantizer.report import Report, make_report
from mgvq_quantizer.report_page import report_page
from mgvq_quantizer.sensitivity import Sensitivity
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.statistics import record_calls
from mgvq_quantizer.stream import Stream, seeded
from mgvq_quantizer.survey import Evidence, kept_survey, survey
from mgvq_quantizer.teacher import Reference, ask_teacher, divergence_with
from mgvq_quantizer.witness import Testimony
from mgvq_quantizer.work_folder import Work, WorkFolder, shared_folder
from mgvq_runtime import __version__
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.files import fingerprint_folder
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.checkpoint.spec import QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.tokenizer.folder import missing_tokenizer_json

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

    plans: dict[str, MatrixPlan]
    solutions: dict[str, Solution]
    features: Features
    """From the quantized vision tower."""
    reference: Reference
    sensitivities: list[Sensitivity]
    """Empty where the allocation is uniform."""
    verdicts: dict[str, Verdict]
    """Empty where every matrix is rounded in one way."""


def quantize(
    model: Path,
    output: Path,
    recipe: QuantRecipe,
    calibration_data: Path | None = None,
    device: str = "cpu",
    show_progress: bool = True,
    shared: Path | None = None,
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

    Returns:
        What was done; also written into the checkpoint as `quantization_report.json` and
        `.html`.

    Raises:
        CheckpointError: if the source is damaged or already quantized, or the output exists.
        CalibrationError: if the data cannot be used.
        ResumeError: if `output.partial` belongs to a run with other settings.
    """
    started = time.monotonic()
    source = _open_source(model, output)
    graph = fill_model(source, device)
    plan(graph, recipe)  # a pattern of `keep` that fits nothing is refused before the long work
    data = read_data(model, graph, recipe, calibration_data)
    facts = _deciding_facts(recipe, model, data)
    unfinished = WorkFolder(output.with_name(output.name + ".partial"), facts)
    work = Work(unfinished, unfinished) if shared is None else _shared_work(shared, facts, recipe)
    with tqdm(unit="matrix", disable=not show_progress) as bar, torch.no_grad():
        done = _round(graph, recipe, work, data, bar)
        with torch.enable_grad():
            tuned = tuning.tune(
                graph,
                done.plans,
                {name: solution.weight for name, solution in done.solutions.items()},
                done.reference,
                ([*data.train, *data.swapped], data.heldout),
                done.features,
                recipe,
                bar.set_description,
            )
    seconds = time.monotonic() - started
    said = done.sensitivities, done.verdicts
    report = make_report(done.plans, done.solutions, tuned, recipe, _facts(data), seconds, *said)
    report = report.with_kept(dense_weights(graph, done.plans))
    _write(output, source, graph, done, tuned, recipe, report)
    unfinished.remove()
    return report


def _deciding_facts(recipe: QuantRecipe, model: Path, data: Data) -> dict[str, Any]:
    """Return everything that decides the tensors."""
    return {
        **recipe.to_json(),
        "source": fingerprint_folder(model),
        "calibration": data.fingerprint,
        "tool_version": __version__,
    }


def _shared_work(folder: Path, facts: Mapping[str, Any], recipe: QuantRecipe) -> Work:
    """Open the folders of each stage, by the facts that decide it."""
    rounding = {name: value for name, value in facts.items() if name not in TUNING_ONLY}
    measured = {name: value for name, value in rounding.items() if name not in ROUNDING_ONLY}
    measured |= {"rates": list(recipe.rates), "reference_rate": recipe.reference_rate}
    return Work(
        shared_folder(folder / SURVEYS, measured), shared_folder(folder / ROUNDED, rounding)
    )


def _open_source(model: Path, output: Path) -> Checkpoint:
    if output.exists():
        raise CheckpointError(f"{output} exists: choose another --output, or delete it")
    source = open_checkpoint(model)
    if source.quantization is not None:
        raise CheckpointError(f"{model} is quantized already: give the original checkpoint")
    return source


def _round(graph: CausalLM, recipe: QuantRecipe, work: Work, data: Data, bar: Any) -> _Rounded:
    """Ask the dense model, plan, then round every matrix; return what tuning needs."""

    def done(name: str, solution: Solution) -> None:
        bar.update()
        bar.set_description(f"{name}, error {solution.error:.4f}")

    device = next(graph.parameters()).device
    bar.set_description("asking the unquantized model")
    pictures = unique_pictures(data.train)
    if graph.visual is not None and not pictures:
        raise CalibrationError(
            f"{data.name} holds no picture: the vision tower cannot be calibrated on text alone"
        )
    features = encode_pictures(graph, unique_pictures(data.all), device)
    reference, head_moment = ask_teacher(graph, length_batches(data.all, device), features)
    plans, weights, found = _plan(graph, recipe, work.survey, data, features, reference, bar)
    train = length_batches(data.train, device)
    stream = Stream(graph, plans, recipe, work.rounding, done, weights)
    step = max(1.0, len(pictures) / recipe.max_pictures)
    shown = [pictures[int(i * step)] for i in range(min(len(pictures), recipe.max_pictures))]
    stream.share_books(list(picture_batches(shown)), train, features, device)
    entered = None
    if recipe.mismatch:
        entered = record_calls(graph.model.layers[0], decoder_runs(graph, train, features))
    for name, parameter in graph.named_parameters():
        if name.rpartition(".")[0] not in plans or not name.endswith(".weight"):
            parameter.copy_(parameter.half())
    if any(name.startswith("visual.") for name in plans):
        stream.vision(list(picture_batches(shown)), device)
    features = encode_pictures(graph, unique_pictures(data.all), device)
    stream.embedding(head_moment)
    testimony = None
    if recipe.gated:
        asked = [_backward_batches(part, recipe, device) for part in (data.train, data.heldout)]
        testimony = Testimony(asked[0], asked[1], features, reference, entered)
    stream.decoder(train, features, testimony)
    return _Rounded(plans, stream.solutions, features, reference, found, stream.verdicts)


def _plan(
    graph: CausalLM,
    recipe: QuantRecipe,
    work: WorkFolder,
    data: Data,
    features: Features,
    reference: Reference,
    bar: Any,
) -> tuple[dict[str, MatrixPlan], TokenWeights, list[Sensitivity]]:
    """Lay out every matrix, by sensitivity where the recipe says so; weigh the tokens."""
    plans = plan(graph, recipe)
    names = [name for name in plans if group_of(name) == "decoder"]
    mixed = recipe.allocation != "uniform" and bool(names)
    bar.reset(total=len(plans) + len(names) * mixed)
    found = kept_survey(names, work) if mixed else []
    if found is not None and not recipe.guided:
        bar.update(len(found))
        return plan(graph, recipe, choose_bands(found, plans, recipe) if mixed else None), {}, found
    bar.set_description("gradients")
    device = reference.head.device
    gradients = squared_gradients(
        graph,
        names,
        _backward_batches(data.train, recipe, device),
        features,
        seeded(recipe.seed, "labels"),
    )
    token = graph.config.image_token_id
    weights = {name: token_weights(gradients[name], data.train, token) for name in names}
    if found is None:
        train = length_batches(data.train, device)
        asked = length_batches([*data.heldout, *data.train[: 2 * len(data.heldout)]], device)
        alone = partial(divergence_with, graph, asked, features, reference)
        evidence = Evidence(train, features, gradients, weights, alone)

        def done(name: str) -> None:
            bar.update()
            bar.set_description(f"sensitivity of {name}")

        found = survey(graph, names, evidence, recipe, work, done)
    if mixed:
        plans = plan(graph, recipe, choose_bands(found, plans, recipe))
    return plans, weights if recipe.guided else {}, found


def _backward_batches(
    samples: Sequence[Sample], recipe: QuantRecipe, device: torch.device
) -> list[TokenBatch]:
    """Samples in their order, as many at once as a step of tuning takes."""
    parts = split_batches(samples, recipe.tuning_batch_tokens)
    return [make_batch(part, device) for part in parts]


def _facts(data: Data) -> dict[str, Any]:
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "conversations": len(data.train),
        "heldout_conversations": len(data.heldout),
    }


def _write(
    output: Path,
    source: Checkpoint,
    graph: CausalLM,
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
        calibration=report.calibration,
        tool_version=__version__,
        source_fingerprint=fingerprint_folder(source.path),
    )
    matrices = {f"{name}.weight" for name in plans}
    dense = (
        (name, tuned.parameters.get(name, parameter.detach()).half().cpu())
        for name, parameter in graph.named_parameters()
        if name not in matrices
    )
    weights = ((n, tuned.weights.get(n, solutions[n].weight).to("cpu")) for n in plans)
    extra_files = {
        "quantization_report.json": report.to_bytes(),
        "quantization_report.html": report_page(report).encode(),
    }
    if (tokenizer := missing_tokenizer_json(source.path)) is not None:
        extra_files["tokenizer.json"] = tokenizer
    files = sorted({file for pattern in _COMPANIONS for file in source.path.glob(pattern)})
    write_checkpoint(
        output,
        config=source.config,
        quantization=quantization,
        dense=dense,
        weights=weights,
        copy_files=[file for file in files if file.is_file()],
        extra_files=extra_files,
    )
