"""The sensitivity of every matrix of an unquantized decoder, block by block (called by `pipeline`).

The inputs of one block's matrices are kept at a time, as second moments; what a matrix yields
(`sensitivity.measure`) is kept in the work folder, so an interrupted survey goes on where it was.
Nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mgvq_quantizer.batches import Features, TokenBatch, decoder_runs
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.gradients import Gradients, TokenWeights, shows_picture, weights_of
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Inputs, Sensitivity, measure
from mgvq_quantizer.statistics import (
    Calls,
    Products,
    checked_moment,
    next_call,
    record_calls,
    rounding_of,
    watch_inputs,
)
from mgvq_quantizer.stream import seeded
from mgvq_quantizer.teacher import Reference, divergence_behind
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.models.causal_lm import CausalLM


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a survey is based on."""

    batches: Sequence[TokenBatch]
    features: Features
    gradients: Mapping[str, Gradients]
    weights: TokenWeights
    asked: Sequence[TokenBatch]
    """Samples on which the divergence is measured that a matrix alone makes."""
    reference: Reference


def kept_survey(names: Sequence[str], work: WorkFolder) -> list[Sensitivity] | None:
    """Return the finished survey of all matrices, or None if one is missing."""
    facts = [work.load_facts(f"sensitivity.{name}") for name in names]
    return None if None in facts else [_from_json(kept) for kept in facts if kept is not None]


def survey(
    model: CausalLM,
    names: Sequence[str],
    evidence: Evidence,
    recipe: QuantRecipe,
    work: WorkFolder,
    progress: Callable[[str], None],
) -> list[Sensitivity]:
    """Measure every matrix of the decoder.

    Args:
        model: dense.
        names: its matrices, in the order data flows.
        evidence: calibration data and what the end loss says about it.
        recipe: rates.
        work: keeps what is finished.
        progress: told the name of each matrix that is done.

    Returns:
        One sensitivity a name, in order.
    """
    found: dict[str, Sensitivity] = {}
    for name in names:
        facts = work.load_facts(f"sensitivity.{name}")
        if facts is not None:
            found[name] = _from_json(facts)
            progress(name)

    if len(found) == len(names):
        return [found[name] for name in names]
    layers = model.model.layers
    train, asked = (
        record_calls(layers[0], decoder_runs(model, batches, evidence.features))
        for batches in (evidence.batches, evidence.asked)
    )
    for i, block in enumerate(layers):
        mine = [name for name in names if name.startswith(f"model.layers.{i}.")]
        missing = [name for name in mine if name not in found]
        inputs, train_left = _inputs(model, missing, block, train, evidence)
        for name in missing:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            with rounding_of(name):
                found[name] = measure(
                    name,
                    module.weight,
                    inputs[name],
                    evidence.gradients[name],
                    recipe,
                    partial(_alone, model, i, block, module, asked, evidence),
                    seeded(recipe.seed, f"sensitivity of {name}"),
                )
            work.save_facts(f"sensitivity.{name}", asdict(found[name]))
            progress(name)
        train, asked = train_left, [next_call(call, block(*call)) for call in asked]
    return [found[name] for name in names]


def _alone(
    model: CausalLM,
    i: int,
    block: nn.Module,
    module: nn.Linear,
    calls: Calls,
    evidence: Evidence,
    weight: Tensor,
) -> float:
    """The model's divergence when one matrix of block `i` has other values `[O, I]`."""
    kept = module.weight
    module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        changed = [next_call(call, block(*call)) for call in calls]
    finally:
        module.weight = kept
    return divergence_behind(model, i + 1, changed, evidence.asked, evidence.reference)


def _inputs(
    model: CausalLM, names: Sequence[str], block: nn.Module, calls: Calls, evidence: Evidence
) -> tuple[dict[str, Inputs], Calls]:
    """Run a block once, and look at what enters its matrices in three ways.

    The pictures' tokens of a model's last block may count nothing: only answers are read there.

    Returns:
        What enters by name, and the calls that would enter the next block.
    """
    modules = {name: model.get_submodule(name) for name in names}
    weights = {name: weights_of(evidence.batches, evidence.weights[name]) for name in names}
    masks = [_pictures(batch.samples, model.config.image_token_id) for batch in evidence.batches]
    plain = {name: Products(None) for name in names}
    weighted = {name: Products(weights[name]) for name in names}
    pictures: dict[str, list[Tensor]] = {name: [] for name in names}
    left: Calls = []

    def take(name: str, x: Tensor) -> None:
        weight, mask = weights[name][len(left)], masks[len(left)]  # [T]
        plain[name].add(x, x)
        weighted[name].add(x, x)
        on_pictures = weight.to(x) * mask.to(x)
        pictures[name].append((on_pictures @ x.square()).double())

    def forward(call: tuple[Any, ...]) -> None:
        left.append(next_call(call, block(*call)))

    watch_inputs(modules, [partial(forward, call) for call in calls], take)
    inputs = {
        name: Inputs(
            checked_moment(name, plain[name].mean()),
            checked_moment(name, weighted[name].mean()),
            torch.stack(pictures[name]).sum(0) / _total(weights[name]),
        )
        for name in names
    }
    return inputs, left


def _total(weights: Sequence[Tensor]) -> float:
    return sum(float(w.double().sum()) for w in weights)


def _pictures(samples: Sequence[Sample], token: int | None) -> Tensor:
    return torch.cat([shows_picture(sample, token) for sample in samples])


def _from_json(facts: Mapping[str, object]) -> Sensitivity:
    """Undo `asdict` and JSON."""

    def tuples(value: object) -> object:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Sensitivity(**{key: tuples(value) for key, value in facts.items()})  # type: ignore[arg-type]
