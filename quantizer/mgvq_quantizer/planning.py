"""What is to be done with every matrix: by the rates' bits, or by what each is sensitive to.

Called by `pipeline` after the dense model was asked. Gradients and survey are kept in the work
folder. Not here: how sensitivities are measured (`survey`), how bits are spent (`precision`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from mgvq_quantizer.allocation import Bands, MatrixPlan, plan
from mgvq_quantizer.batches import (
    Features,
    TokenBatch,
    length_batches,
    make_batch,
    split_batches,
)
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.channel_classes import channels_of
from mgvq_quantizer.dataset import Data
from mgvq_quantizer.gradients import (
    Gradients,
    TokenWeights,
    pack,
    squared_gradients,
    token_weights,
    unpack,
)
from mgvq_quantizer.precision import choose_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity
from mgvq_quantizer.stream import seeded
from mgvq_quantizer.survey import Evidence, kept_survey, survey
from mgvq_quantizer.teacher import Reference
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.models.causal_lm import CausalLM

BACKWARD_TOKENS = 2048
"""Tokens of a forward and backward for gradients. No setting: labels are drawn batch by batch, so
gradients, and a survey that runs may share, would depend on it."""
_ALONE_ANSWERS = 1024
"""Answer tokens on which the divergence of every single matrix is measured: one forward each."""


def make_plans(
    graph: CausalLM,
    recipe: QuantRecipe,
    work: WorkFolder,
    data: Data,
    features: Features,
    reference: Reference,
    tables: Mapping[str, Bands],
    bar: Any,
) -> tuple[dict[str, MatrixPlan], TokenWeights, list[Sensitivity]]:
    """Lay out every matrix, by sensitivity where the recipe says so; weigh the tokens.

    Args:
        graph: the dense model.
        recipe: rates, and how bits are spent.
        work: where gradients and survey are kept.
        data: calibration data.
        features: rows of every picture.
        reference: what the dense model says.
        tables: the bands of the parts of token table and head, by name.
        bar: a tqdm bar; its total is set.

    Returns:
        The plans by name; token weights by matrix, empty where all tokens count alike; what every
        matrix is sensitive to, empty where that was not asked.
    """
    plans = plan(graph, recipe, tables)
    names = [name for name in plans if group_of(name) == "decoder"]
    mixed = recipe.allocation != "uniform" and bool(names)
    bar.reset(total=len(plans) + len(names) * mixed)
    found = kept_survey(names, work) if mixed else []
    if found is not None and not recipe.guided and not recipe.channel_classes:
        bar.update(len(found))
        bands = choose_bands(found, plans, recipe) if mixed else {}
        return plan(graph, recipe, {**tables, **bands}), {}, found
    bar.set_description("gradients")
    device = reference.head.device
    gradients = _gradients(graph, names, recipe, work, data, features, device)
    token = graph.config.image_token_id
    weights = {name: token_weights(gradients[name], data.train, token) for name in names}
    train = length_batches(data.train, device)
    channels = None
    if recipe.channel_classes:
        channels = channels_of(graph, names, train, features, weights, recipe)
        plans = plan(graph, recipe, tables, channels)
    if found is None:
        asked = length_batches(first_answers(data), device)
        evidence = Evidence(train, features, gradients, weights, asked, reference)

        def done(name: str) -> None:
            bar.update()
            bar.set_description(f"sensitivity of {name}")

        found = survey(graph, names, evidence, recipe, work, done)
    if mixed:
        bands = choose_bands(found, plans, recipe, channels)
        plans = plan(graph, recipe, {**tables, **bands}, channels)
    return plans, weights if recipe.guided else {}, found


def _gradients(
    graph: CausalLM,
    names: Sequence[str],
    recipe: QuantRecipe,
    work: WorkFolder,
    data: Data,
    features: Features,
    device: torch.device,
) -> dict[str, Gradients]:
    """Compute the gradients of the dense model, or take them from the work folder."""
    kept = work.load_tensors("gradients")
    if kept is not None:
        return unpack(kept[0], names, data.train, device)
    batches = backward_batches(data.train, device)
    labels = seeded(recipe.seed, "labels")
    found = squared_gradients(graph, names, batches, features, labels)
    work.save_tensors("gradients", pack(found, data.train))
    return found


def first_answers(data: Data) -> list[Sample]:
    """Return the first samples, those held out before all, with `_ALONE_ANSWERS` answer tokens
    between them; at least one."""
    samples = [*data.heldout, *data.train]
    before = accumulate((int(sample.is_answer.sum()) for sample in samples), initial=0)
    return [s for s, count in zip(samples, before, strict=False) if count < _ALONE_ANSWERS]


def backward_batches(samples: Sequence[Sample], device: torch.device) -> list[TokenBatch]:
    """Return samples in their order, at least one and at most `BACKWARD_TOKENS` in a batch."""
    return [make_batch(part, device) for part in split_batches(samples, BACKWARD_TOKENS)]
