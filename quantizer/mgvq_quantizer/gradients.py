"""What the end loss says about each matrix: how much its tokens and its outputs count.

Called by `pipeline`. One forward and backward over the calibration samples, with labels drawn from
the model itself, so that the squared gradients are the curvature of the loss (Fisher) and not the
mistakes of the model. Not here: moments of inputs (`statistics`), what is made of the weights
(`sensitivity`, `stream`).

Source: method memo B.1, B.2 `guided`, C.6; GuidedQuant (arXiv 2505.07004), MBQ (arXiv 2412.19509).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mgvq_quantizer.batches import Features, TokenBatch, embed
from mgvq_quantizer.calibration import CalibrationError, Sample
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
    rows: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    """`[O]` float64: the sum over all tokens of each output's squared gradient."""


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
        outputs: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name in names:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(_keeper(outputs, name)).remove)
            rows = embed(model, batch, features).detach().requires_grad_()
            hidden = model(rows, batch.forward)[batch.answer_rows]
            log_probs = model.logits(hidden).log_softmax(-1)  # [A, V]
            chances = log_probs.detach().exp().cpu()
            labels = torch.multinomial(chances, 1, generator=generator).to(log_probs.device)
            loss = -log_probs.gather(1, labels).sum()
            kept = [outputs[name] for name in names]
            gradients = torch.autograd.grad(loss, kept)
        for name, gradient in zip(names, gradients, strict=True):
            _collect(found[name], name, batch, gradient.float().reshape(-1, gradient.shape[-1]))
    return found


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


def _keeper(
    outputs: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return keep


def _collect(found: Gradients, name: str, batch: TokenBatch, gradient: Tensor) -> None:
    squares = gradient.square()  # [T, O]
    if not bool(torch.isfinite(squares).all()):
        raise CalibrationError(
            f"the gradients at the outputs of {name} are not finite on {batch.samples[0].where}: "
            "check the unquantized model with mgvq-eval, or try other calibration data"
        )
    found.rows = found.rows + squares.double().sum(0)
    lengths = [len(sample.token_ids) for sample in batch.samples]
    for sample, part in zip(batch.samples, torch.split(squares.sum(1), lengths), strict=True):
        found.energies[id(sample)] = part
