"""A baseline through a model's decoder, as our own quantizer goes through it (for `comparison`).

The same matrices (q/k/v and gate/up fused), the same calibration tokens, the same order: each
matrix sees what the quantized ones before it produce. Embedding, head and vision tower stay as they
are, and bits are counted over the decoder's matrices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mgvq_quantizer.baselines.interface import Baseline, Fisher, Layer, Quantized
from mgvq_quantizer.batches import Features, TokenBatch, decoder_runs, embed, make_batch
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.statistics import Run, input_moment, record_calls
from mgvq_quantizer.stream import seeded
from mgvq_quantizer.walk import walk_blocks
from mgvq_runtime.models.causal_lm import CausalLM

_MULTIPLE = 8
"""Of the widths that are quantized, as in `allocation`."""


@torch.no_grad()
def quantize_decoder(
    model: CausalLM,
    quantize: Baseline,
    target: float,
    seed: int,
    batches: Sequence[TokenBatch],
    features: Features,
    fishers: Mapping[str, Fisher],
    progress: Callable[[str], None],
) -> dict[str, Quantized]:
    """Replace the decoder's matrices by their quantized values.

    Args:
        model: dense; changed in place.
        quantize: the baseline.
        target: bits a weight in full, for every matrix.
        seed: of the run.
        batches: calibration tokens.
        features: rows of their pictures.
        fishers: gradients by matrix, for baselines that need them.
        progress: told the name of each matrix.

    Returns:
        The quantized matrices by name.

    Raises:
        NotDefined: if the method has no setting for a matrix.
    """
    results: dict[str, Quantized] = {}

    def visit(i: int, runs: Sequence[Run]) -> None:
        for name, linear in decoder_linears(model, i).items():
            progress(name)
            moment = input_moment(name, linear, runs)
            layer = Layer(linear.weight.float(), moment, fishers.get(name))
            results[name] = quantize(layer, target, seeded(seed, name))
            linear.weight.copy_(results[name].weight)

    layers = model.model.layers
    runs = decoder_runs(model, batches, features)
    walk_blocks(layers, record_calls(layers[0], runs), visit)
    return results


def bits_per_weight(results: Mapping[str, Quantized]) -> float:
    """Return stored bits a weight of quantized matrices, in full."""
    bits = sum(result.bits for result in results.values())
    return bits / sum(result.weight.numel() for result in results.values())


def decoder_linears(model: CausalLM, block: int) -> dict[str, nn.Linear]:
    """Return the matrices of a decoder block that are quantized, in the order data flows."""
    return {
        f"model.layers.{block}.{name}": module
        for name, module in model.model.layers[block].named_modules()
        if isinstance(module, nn.Linear) and module.in_features % _MULTIPLE == 0
    }


@torch.enable_grad()
def fishers_of(model: CausalLM, samples: Sequence[Sample], features: Features) -> dict[str, Fisher]:
    """Return the gradients' moments of all decoder matrices of a dense model.

    The loss is the cross-entropy of the right answers, summed over a sample's answer tokens; one
    backward a sample. Needs `O^2 + I^2 + O*I` float64 a matrix.

    Args:
        model: dense; its weights are not changed.
        samples: calibration conversations.
        features: rows of their pictures.

    Returns:
        One a matrix, by name.
    """
    device = next(model.parameters()).device
    linears = {
        name: linear
        for block in range(len(model.model.layers))
        for name, linear in decoder_linears(model, block).items()
    }
    sums: dict[str, list[Tensor]] = {}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    for sample in samples:
        batch = make_batch([sample], device)
        hidden = model(embed(model, batch, features), batch.forward)
        logits = model.logits(hidden[batch.answer_rows])  # [A, V]
        targets = batch.token_ids[batch.answer_rows + 1]
        weights = [linear.weight for linear in linears.values()]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        for name, gradient in zip(linears, torch.autograd.grad(loss, weights), strict=True):
            O, I = gradient.shape  # noqa: E741
            new = (gradient, gradient @ gradient.T / I, gradient.T @ gradient / O)
            totals = sums.setdefault(name, [torch.zeros_like(part).double() for part in new])
            for total, part in zip(totals, new, strict=True):
                total.add_(part)
    for linear in linears.values():
        linear.weight.requires_grad_(False)
    count = len(samples)
    return {name: Fisher(*(total / count for total in totals)) for name, totals in sums.items()}
