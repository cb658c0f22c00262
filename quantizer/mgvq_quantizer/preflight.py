"""What is refused before hours are spent: a budget that cannot be met, weights that cannot be
stored, a disk without room.

Called by `pipeline`, on the dense model, and by `forecast`. Nothing is written and nothing
computed. Not here: whether weights are finite (`mgvq_runtime.models.loading` sees to it),
calibration data (`dataset`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from mgvq_quantizer.allocation import MatrixPlan, plan
from mgvq_quantizer.expected_layout import expected_plans
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.residence import every_parameter
from mgvq_runtime.checkpoint.bits import TOTAL, count_bits
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.causal_lm import CausalLM

_LARGEST = torch.finfo(torch.float16).max


def check(graph: CausalLM, recipe: QuantRecipe, output: Path, work: Path) -> None:
    """Refuse what cannot end well: see `check_budget`, `check_weights` and `check_room`."""
    check_budget(graph, recipe)
    check_weights(graph, recipe)
    check_room(graph, recipe, output, work)


def check_budget(graph: CausalLM, recipe: QuantRecipe) -> None:
    """Refuse bits that do not pay for the lowest rates with their tables, scales and order.

    Raises:
        ConfigError: with what the lowest rates take.
    """
    with torch.device("meta"):
        outline = type(graph)(graph.config)
    expected_plans(outline, recipe)


def check_by_block(recipe: QuantRecipe, by_block: bool) -> None:
    """Refuse a run by block that would need the whole model after all.

    Raises:
        ConfigError: if it is to be tuned end to end.
    """
    if by_block and recipe.tuning_steps:
        raise ConfigError(
            f"tuning_steps is {recipe.tuning_steps}, but tuning end to end holds the whole model: "
            "give --tuning-steps 0 with --stream, or leave --stream out"
        )


def check_weights(graph: CausalLM, recipe: QuantRecipe) -> None:
    """Refuse a model whose norms, biases or row scales are beyond float16, in which they are kept.

    Args:
        graph: dense, finite.
        recipe: says which matrices are quantized.

    Raises:
        CheckpointError: naming every parameter and its largest magnitude.
    """
    matrices = {f"{name}.weight" for name in plan(graph, recipe)}
    problems = []
    for name, parameter in every_parameter(graph):
        values = parameter.detach().double()
        if name in matrices:
            values = values.square().mean(1).sqrt()  # [O]
        largest = float(values.abs().max())
        if not largest <= _LARGEST:
            what = "the root mean square of a row" if name in matrices else "its largest magnitude"
            problems.append(f"{name}: {what} is {largest:g}")
    if problems:
        raise CheckpointError(
            f"the model cannot be stored in float16, which ends at {_LARGEST:g}: fetch the source "
            "again, or choose another",
            problems,
        )


def check_room(graph: CausalLM, recipe: QuantRecipe, output: Path, work: Path) -> None:
    """Refuse a disk that clearly cannot hold the checkpoint and the unfinished work beside it.

    What is counted is the least that is needed: tensors alone, no tokenizer and no headers.

    Args:
        graph: dense.
        recipe: how many bits.
        output: the folder that will be written.
        work: the folder of unfinished work beside it; what it holds already needs no more room.

    Raises:
        CheckpointError: with the room that is needed and the room there is.
    """
    matrices, others = expected_bytes(graph, recipe)
    held = sum(file.stat().st_size for file in work.iterdir()) if work.is_dir() else 0
    needed = matrices + others + max(0, matrices - held)
    home = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise CheckpointError(
            f"{output} needs at least {needed:,} bytes ({matrices + others:,} for the checkpoint, "
            f"{needed - matrices - others:,} for unfinished work beside it), but {free:,} are free "
            f"in {home}: free some space, or choose an --output on another disk"
        )


def expected_bytes(graph: CausalLM, recipe: QuantRecipe) -> tuple[int, int]:
    """Return `stored_bytes` before bands are chosen: they will cost what was asked for."""
    plans = plan(graph, recipe)
    return stored_bytes(graph, plans, None if recipe.allocation == "uniform" else recipe.bits)


def stored_bytes(
    graph: CausalLM, plans: Mapping[str, MatrixPlan], decoder_bits: float | None = None
) -> tuple[int, int]:
    """Return the bytes of a checkpoint's matrices, and of everything it keeps in float16.

    Args:
        graph: dense.
        plans: of every matrix.
        decoder_bits: bits a weight of the decoder, counted in full; None counts its plans'.
    """
    counts = count_bits({name: matrix.spec for name, matrix in plans.items()})
    bits = counts[TOTAL].bits
    if decoder_bits is not None and "decoder" in counts:
        bits += int(decoder_bits * counts["decoder"].weights) - counts["decoder"].bits
    matrices = {f"{name}.weight" for name in plans}
    others = sum(p.numel() for name, p in graph.named_parameters() if name not in matrices)
    return bits // 8, 2 * others
