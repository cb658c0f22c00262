"""What a quantization run will take, from shapes alone (called by `cli` for `--plan`).

The model's graph is made on the meta device and no tensor is read. Work is counted by `stage_work`,
bytes by `stage_memory` and `preflight`, the machine's speed is measured by `machine_speed`. Bands
of several rates cannot be known before the survey: they are chosen as a run would, on losses that
differ as much as those that were measured; classes of channels are not told apart. Reading the
model and the data is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mgvq_kernels.layout import rate_stages
from mgvq_quantizer import solver_work as work
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.assumed_data import expected_data
from mgvq_quantizer.batches import unique_pictures
from mgvq_quantizer.dataset import Data, open_dense
from mgvq_quantizer.expected_layout import expected_plans
from mgvq_quantizer.machine_speed import Speed, measure_speed
from mgvq_quantizer.own_answers import MAX_ANSWER_TOKENS, expect_answers
from mgvq_quantizer.pipeline import companions
from mgvq_quantizer.preflight import check_by_block, stored_bytes
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import peak_memory_bytes
from mgvq_quantizer.solver_work import STORE, Work
from mgvq_quantizer.stage_memory import StageMemory
from mgvq_quantizer.stage_work import Reading, Stages
from mgvq_runtime.checkpoint.bits import count_bits, group_of
from mgvq_runtime.checkpoint.files import read_json
from mgvq_runtime.checkpoint.manifest import CONFIG_NAME, MANIFEST_NAME
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import model_config
from mgvq_runtime.models.registry import find_family


@dataclass(frozen=True)
class StageForecast:
    """One stage of a run."""

    name: str
    macs: int
    """Multiply-adds."""
    seconds: float
    peak_bytes: int
    """Of the device that computes; on a CPU with the process."""


@dataclass(frozen=True)
class Forecast:
    """A whole run."""

    model: str
    parameters: int
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    """What the data are, whether they were assumed, and their sizes."""
    machine: Mapping[str, Any]
    stages: tuple[StageForecast, ...]
    bits_per_weight: Mapping[str, float]
    """By group, counted in full."""
    checkpoint_bytes: int
    """Tensors, and the files that travel along."""
    work_folder_bytes: int
    """`OUTPUT.partial` before the checkpoint is written beside it."""
    by_block: bool
    """Whether blocks are in memory one by one."""

    @property
    def seconds(self) -> float:
        """Return the time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Return the peak of the stage that needs most."""
        return max(stage.peak_bytes for stage in self.stages)

    def to_json(self) -> str:
        """Return one line of JSON."""
        totals = {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        return json.dumps({**asdict(self), **totals})

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        yield f"model         {self.model}, {self.parameters:,} parameters"
        data = self.calibration
        sizes = (
            f"{data['conversations']:,} + {data['heldout']:,} held out, {data['tokens']:,} tokens"
        )
        kind = "assumed" if data["assumed"] else f"read from {data['name']}"
        yield f"calibration   {kind}: {sizes}, {data['pictures']:,} pictures"
        if data["assumed"]:
            yield f"              {data['assumed']}"
        if data["own_answers"]:
            yield (
                f"              {data['own_answers']:,} answers are the model's own, counted with "
                f"{MAX_ANSWER_TOKENS} tokens each, the most"
            )
        machine = self.machine
        yield (
            f"machine       {machine['device']}, CPU threads: {machine['threads']}, "
            f"{machine['gmacs_per_second']:,.0f} GMAC/s in a forward"
        )
        if self.by_block:
            yield "              blocks one by one; reading them again and again is not counted"
        yield ""
        yield f"{'stage':<24}{'work, GMAC':>16}{'time':>12}{'peak memory':>14}"
        for stage in self.stages:
            yield (
                f"{stage.name:<24}{stage.macs / 1e9:>16,.1f}{_duration(stage.seconds):>12}"
                f"{_size(stage.peak_bytes):>14}"
            )
        macs = sum(stage.macs for stage in self.stages)
        yield (
            f"{'total':<24}{macs / 1e9:>16,.1f}{_duration(self.seconds):>12}"
            f"{_size(self.peak_bytes):>14}"
        )
        yield ""
        bits = ", ".join(f"{group} {rate:.3f}" for group, rate in self.bits_per_weight.items())
        yield f"bits a weight  {bits}"
        yield f"checkpoint     {_size(self.checkpoint_bytes)} ({self.checkpoint_bytes:,} bytes)"
        disk = self.checkpoint_bytes + self.work_folder_bytes
        yield f"disk           {_size(disk)}, {_size(self.work_folder_bytes)} of it while it runs"


def forecast(
    model: Path,
    recipe: QuantRecipe,
    calibration: Path | None = None,
    device: str = "cpu",
    by_block: bool = False,
) -> Forecast:
    """Plan a run; nothing is loaded but headers, JSON and calibration data.

    Args:
        model: a dense checkpoint folder, or one with config.json alone.
        recipe: settings.
        calibration: see `calibration.load_conversations`.
        device: where the run would compute; its speed is measured.
        by_block: as `pipeline.quantize` takes it.

    Raises:
        CheckpointError: if the folder is damaged, has no config.json or is already quantized.
        ConfigError: if the architecture is not supported, the bits cannot be met, or the recipe
            asks for what cannot be done by block.
        CalibrationError: if data that were named cannot be used.
    """
    check_by_block(recipe, by_block)
    source = _open(model)
    graph = _graph(source)
    plans = expected_plans(graph, recipe)
    data, assumed = expected_data(source, graph, recipe, calibration)
    if not by_block:
        data = expect_answers(data, graph.config.text_config.max_position_embeddings, recipe)
    files = sum(file.stat().st_size for file in companions(source.path))
    stored = stored_bytes(graph, plans)
    stages = Stages(graph, plans, recipe, data)
    coded = {stage for p in plans.values() for band in p.layout.bands for stage in band.stages}
    coded |= {s for rate in recipe.rates for s in rate_stages(rate, recipe.codec, recipe.window)}
    widest = max(stages.linears.values(), key=lambda shape: shape[0] * shape[1])
    speed = measure_speed(recipe, widest, coded, device)
    process = peak_memory_bytes() if device == "cpu" else 0  # with all that a run imports, too
    return Forecast(
        model=find_family(source.config).architecture,
        parameters=sum(parameter.numel() for parameter in graph.parameters()),
        recipe=recipe.to_json(),
        calibration=_facts(data, assumed),
        machine=_machine(speed),
        stages=tuple(
            _forecast_stages(stages, StageMemory(stages, stored, by_block), speed, process)
        ),
        bits_per_weight=_bits(plans),
        checkpoint_bytes=sum(stored) + files,
        work_folder_bytes=_work_folder_bytes(stages),
        by_block=by_block,
    )


def _open(model: Path) -> Checkpoint:
    """Open a folder; one without weights is taken at its config.json's word."""
    folder = model.expanduser()
    has_weights = any(folder.glob("*.safetensors")) or (folder / MANIFEST_NAME).exists()
    if has_weights or not (folder / CONFIG_NAME).is_file():
        return open_dense(folder)
    config = read_json(folder / CONFIG_NAME)
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{model} is quantized already: give the original checkpoint")
    return Checkpoint(folder, config, None, {}, {}, None)


def _graph(source: Checkpoint) -> CausalLM:
    family = find_family(source.config)
    is_bare = not source.dense
    config = family.config.from_hf(source.config) if is_bare else model_config(source)
    with torch.device("meta"):
        return family.model(config)


def _forecast_stages(
    stages: Stages, memory: StageMemory, speed: Speed, process: int
) -> Iterator[StageForecast]:
    write = Work({STORE: 3 * memory.checkpoint_bytes})  # digested when written, and when read back
    for name, amount, peak in (
        ("own answers", stages.own_answers(), memory.own_answers),
        ("ask the dense model", stages.ask_teacher(), memory.ask_teacher),
        ("gradients", stages.squared_gradients(), memory.squared_gradients),
        ("survey", stages.survey(), memory.survey),
        ("shared tables", stages.share_books(), memory.share_books),
        ("vision rounding", stages.vision(), memory.vision),
        ("embedding", stages.embedding(), memory.embedding),
        ("decoder rounding", stages.decoder(), memory.decoder),
        ("tuning" if stages.recipe.tuning_steps else "held-out KL", stages.tune(), memory.tune),
        ("write", write, memory.write),
    ):
        if amount:
            yield StageForecast(name, work.macs(amount), speed.time(amount), process + peak())


def _facts(data: Data, assumed: str) -> dict[str, Any]:
    return {
        "name": data.name,
        "assumed": assumed,
        "conversations": len(data.train),
        "heldout": len(data.heldout),
        "tokens": Reading.of(data.all).tokens,
        "pictures": len(unique_pictures(data.all)),
        "own_answers": len(data.own),
    }


def _machine(speed: Speed) -> dict[str, Any]:
    return {
        "device": speed.device,
        "threads": speed.threads,
        "gmacs_per_second": 1e-9 / speed.seconds[work.FORWARD],
        "seconds_a_unit": speed.seconds,
    }


def _bits(plans: Mapping[str, MatrixPlan]) -> dict[str, float]:
    counts = count_bits({name: matrix.spec for name, matrix in plans.items()})
    return {group: count.bits_per_weight for group, count in counts.items()}


def _work_folder_bytes(stages: Stages) -> int:
    """Every matrix with tables of its own, shared or not, and what gradients say of every token."""
    layouts = {name: matrix.layout for name, matrix in stages.plans.items()}
    bits = (x.code_bits() + x.codebook_bits() + x.side_bits() for x in layouts.values())
    rows = [x.out_features for name, x in layouts.items() if group_of(name) == "decoder"]
    energies = sum(8 * O + 4 * stages.train.tokens for O in rows) if stages.weighed else 0  # noqa: E741
    return sum(bits) // 8 + energies


def _duration(seconds: float) -> str:
    """Write a time for people."""
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(count: int) -> str:
    """Write a number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return (
                f"{count / factor:,.2f} {unit}"
                if unit == "GiB"
                else f"{count / factor:,.0f} {unit}"
            )
    return f"{count} B"
