"""What the end loss says about each matrix: how much its tokens and its outputs count.

Called by `pipeline` and `witness`. Forwards and backwards over calibration samples, with labels
drawn from the model itself, so that the squared gradients are the curvature of the loss (Fisher)
and not the mistakes of the model. The gradients of the divergence from the original model, which
tell where a half-quantized one has drifted to, come beside them. Not here: moments of inputs
(`statistics`), what is made of the weights and gradients (`sensitivity`, `stream`, `curvature`).

Source: method memo B.1, B.2 `guided`, C.6; GuidedQuant (arXiv 2505.07004), MBQ (arXiv 2412.19509).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgvq_quantizer.backward import sides_of
from mgvq_quantizer.batches import Features, TokenBatch
from mgvq_quantizer.calibration import CalibrationError, Sample
from mgvq_quantizer.curvature import SampleGradients
from mgvq_quantizer.teacher import Reference, divergence
from mgvq_runtime.models.causal_lm import CausalLM

_FLOOR = 0.3
"""Share of a token's weight that is its modality's mean: the pictures' tokens of the last block get
no gradient at all, as only the answers' rows are read there (memo B.1: rho)."""

TokenWeights = Mapping[str, Mapping[int, Tensor]]
"""`[T]` float32: how much each token counts, by name of the matrix and `id` of the sample."""


@dataclass(eq=False)
class Gradients:
    """Squared gradients at the outputs of one matrix."""

    energies: dict[int, Tensor] = field(default_factory=dict)
    """`[T]` float32 of each sample, by its `id`: the squared norm of each token's gradient."""
    rows: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """`[O]` float64: the sum over all tokens of each output's squared gradient."""


@dataclass(frozen=True, eq=False)
class MatrixGradients:
    """What reaches one matrix from two losses, sample by sample."""

    likelihood: SampleGradients
    """Of `-log p` of labels drawn from the model; its second moment is the curvature."""
    divergence: SampleGradients
    """Of `KL(reference || model)`; its mean is the slope."""


def squared_gradients(
    model: CausalLM,
    names: Sequence[str],
    batches: Iterable[TokenBatch],
    features: Features,
    generator: torch.Generator,
) -> dict[str, Gradients]:
    """Run the samples forward and backward and collect what reaches each matrix.

    Args:
        model: dense.
        names: linear layers of the decoder.
        batches: samples; each is run once.
        features: rows of every picture.
        generator: draws the labels.

    Returns:
        The squared gradients by name of the matrix.

    Raises:
        CalibrationError: if a gradient is not finite.
    """
    found = {name: Gradients() for name in names}
    for batch in batches:

        def losses(log_probs: Tensor) -> list[Tensor]:
            return [_drawn_loss(log_probs, generator)]

        for name, sides in sides_of(model, names, batch, features, losses).items():
            _collect(found[name], name, batch, _flat(sides.gradients[0]))
    return found


def pack(found: Mapping[str, Gradients], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return gradients as tensors by name, to be kept; the samples' order stands for their `id`."""
    tensors = {}
    for name, gradients in found.items():
        tensors[f"{name}.rows"] = gradients.rows
        tensors[f"{name}.energies"] = torch.cat([gradients.energies[id(s)] for s in samples])
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    samples: Sequence[Sample],
    device: torch.device,
) -> dict[str, Gradients]:
    """Undo `pack`, bit for bit."""
    lengths = [len(sample.token_ids) for sample in samples]
    found = {}
    for name in names:
        parts = torch.split(tensors[f"{name}.energies"].to(device), lengths)
        energies = {id(sample): part for sample, part in zip(samples, parts, strict=True)}
        found[name] = Gradients(energies, tensors[f"{name}.rows"].to(device))
    return found


def sample_gradients(
    model: CausalLM,
    names: Sequence[str],
    batches: Iterable[TokenBatch],
    features: Features,
    reference: Reference,
    generator: torch.Generator,
    draws: int = 1,
) -> dict[str, MatrixGradients]:
    """Run the samples forward and backward and keep both sides of every sample's gradients.

    Holds inputs and output gradients of all tokens: ask for the matrices of one block at a time.

    Args:
        model: dense arithmetic, quantized as far as the caller has come.
        names: linear layers of the decoder.
        batches: samples; each is run once.
        features: rows of every picture.
        reference: what the unquantized model says about the samples.
        generator: draws the labels.
        draws: how often labels are drawn for each sample; each time makes a sample of its own.

    Returns:
        The gradients by name of the matrix.

    Raises:
        CalibrationError: if a gradient is not finite.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    sides: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(1 + draws)] for name in names}
    for batch in batches:
        original = reference.log_probs(batch.samples)

        def losses(log_probs: Tensor, original: Tensor = original) -> list[Tensor]:
            drawn = [_drawn_loss(log_probs, generator) for _ in range(draws)]
            return [divergence(original, log_probs).sum(), *drawn]

        lengths = [len(sample.token_ids) for sample in batch.samples]
        for name, reached in sides_of(model, names, batch, features, losses).items():
            inputs[name] += torch.split(_flat(reached.inputs), lengths)
            for side, gradient in zip(sides[name], reached.gradients, strict=True):
                flat = _flat(gradient)
                _check_finite(flat, name, batch)
                side += torch.split(flat, lengths)
    return {
        name: MatrixGradients(
            SampleGradients(tuple(inputs[name] * draws), tuple(sum(sides[name][1:], []))),
            SampleGradients(tuple(inputs[name]), tuple(sides[name][0])),
        )
        for name in names
    }


def token_weights(
    gradients: Gradients, samples: Sequence[Sample], picture_token: int | None
) -> dict[int, Tensor]:
    """Turn squared gradients into how much each token counts, the mean of all being 1.

    A token's weight is its energy, mixed with the mean energy of its modality: pictures or text.

    Args:
        gradients: of one matrix.
        samples: all that the gradients cover.
        picture_token: the placeholder's token id; None for a model without pictures.

    Returns:
        `[T]` float32 of each sample, by its `id`.
    """
    energy = torch.cat([gradients.energies[id(sample)] for sample in samples])
    is_picture = torch.cat([shows_picture(s, picture_token) for s in samples]).to(energy.device)
    weights = (1 - _FLOOR) * energy
    for mask in (is_picture, ~is_picture):
        if bool(mask.any()):
            weights[mask] += _FLOOR * energy[mask].mean()
    mean = weights.double().mean()
    if not float(mean):
        return {id(sample): torch.ones(len(sample.token_ids)) for sample in samples}
    weights = (weights / mean).float()
    lengths = [len(sample.token_ids) for sample in samples]
    parts = torch.split(weights, lengths)
    return {id(sample): part for sample, part in zip(samples, parts, strict=True)}


def shows_picture(sample: Sample, picture_token: int | None) -> Tensor:
    """Return `[T]` bool: which tokens of a sample stand for a piece of a picture."""
    if picture_token is None:
        return torch.zeros(len(sample.token_ids), dtype=torch.bool)
    return torch.from_numpy(sample.token_ids == picture_token)


def weights_of(batches: Sequence[TokenBatch], weights: Mapping[int, Tensor]) -> list[Tensor]:
    """Return one `[T]` a batch, from weights by sample."""
    return [torch.cat([weights[id(sample)] for sample in batch.samples]) for batch in batches]


def _drawn_loss(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """The summed negative log-likelihood of labels that are drawn from the model."""
    chances = log_probs.detach().exp().cpu()
    labels = torch.multinomial(chances, 1, generator=generator).to(log_probs.device)
    return -log_probs.gather(1, labels).sum()


def _flat(rows: Tensor) -> Tensor:
    """`[T, D]` float32."""
    return rows.float().reshape(-1, rows.shape[-1])


def _check_finite(gradient: Tensor, name: str, batch: TokenBatch) -> None:
    if not bool(torch.isfinite(gradient).all()):
        raise CalibrationError(
            f"the gradients at the outputs of {name} are not finite on {batch.samples[0].where}: "
            "check the unquantized model with mgvq-eval, or try other calibration data"
        )


def _collect(found: Gradients, name: str, batch: TokenBatch, gradient: Tensor) -> None:
    squares = gradient.square()  # [T, O]
    _check_finite(squares, name, batch)
    found.rows = found.rows + squares.double().sum(0)
    lengths = [len(sample.token_ids) for sample in batch.samples]
    for sample, part in zip(batch.samples, torch.split(squares.sum(1), lengths), strict=True):
        found.energies[id(sample)] = part
