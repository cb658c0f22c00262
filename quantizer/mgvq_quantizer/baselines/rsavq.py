"""RSAVQ-like: input channels in four groups by the size of their natural gradient, a codebook each.

A channel's score is `I_c = 1/2 g_c^T F_c^-1 g_c` with `F_c = F_O * (F_I)_cc` of the Kronecker
factors; its share of the bits goes with `log2(1 + I_c)`. Channels are sorted by score and cut into
four groups of equal size; a group takes the mean share of its channels and has one codebook of
float16 vectors along the inputs, trained by plain k-means. No error is compensated. Stored beside
codes and codebooks: two bits a channel that say its group, as inside a group channels keep their
order.

Source: RSAVQ (arXiv 2510.01240), scores and groups. Left out: the shift of the k-means target by
the natural gradient (its size depends on a scaling of F that the paper leaves open).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mgvq_quantizer.baselines import kmeans
from mgvq_quantizer.baselines.interface import (
    FLOAT16_BITS,
    Fisher,
    Layer,
    Quantized,
    Values,
    fits,
    refuse,
)
from mgvq_quantizer.ldl import damp

_GROUPS = 4
_GROUP_BITS = 2
_DIMS = (6, 4, 2)
_MAX_INDEX_BITS = 14
_DAMPING = 0.01
_STEPS = 64
"""Levels of the common factor of all shares that are tried, up to the target."""
_ITERATIONS = 30


@dataclass(frozen=True)
class Setting:
    """Vector length, and the index bits of every group."""

    dim: int
    index_bits: tuple[int, ...]
    widths: tuple[int, ...]
    """Channels of every group; the last vector of a row may be padded."""

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Count codes, codebooks and group membership."""
        codes = sum(
            bits * out_features * -(-width // self.dim)
            for bits, width in zip(self.index_bits, self.widths, strict=True)
        )
        books = sum(FLOAT16_BITS * self.dim * 2**bits for bits in self.index_bits)
        return codes + books + _GROUP_BITS * in_features


def channel_scores(fisher: Fisher) -> Tensor:
    """Return `I_c` of every input channel `[I]`: half the squared natural gradient."""
    gradient = fisher.gradient
    natural = torch.linalg.solve(damp(fisher.outputs, _DAMPING), gradient)
    diagonal = damp(fisher.inputs, _DAMPING).diagonal()
    return 0.5 * (gradient * natural).sum(0) / diagonal


def choose_setting(weight: Tensor, shares: Tensor, target: float) -> Setting:
    """Return the setting with most index bits a weight; of equal ones that with long vectors.

    Args:
        weight: `[O, I]`.
        shares: `[4]`: the groups' shares of the bits, 1 on average.
        target: bits a weight in full.

    Raises:
        NotDefined: if none fits.
    """
    O, I = weight.shape  # noqa: E741
    widths = tuple(len(part) for part in torch.arange(I).tensor_split(_GROUPS))
    settings = [
        Setting(
            dim,
            tuple(
                min(_MAX_INDEX_BITS, max(1, round(dim * target * step / _STEPS * share)))
                for share in shares.tolist()
            ),
            widths,
        )
        for dim in _DIMS
        for step in range(_STEPS, 0, -1)
    ]
    fitting = [s for s in settings if fits(s.stored_bits(O, I), O * I, target)]
    if not fitting:
        raise refuse("RSAVQ", weight, target)
    return max(fitting, key=lambda setting: sum(setting.index_bits) / setting.dim)


def rsavq(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
    """Quantize group by group of channels.

    Args:
        layer: the weight and its `fisher`; the second moment is not looked at.
        target: bits a weight in full.
        generator: draws the first codebooks.

    Raises:
        NotDefined: if no setting fits.
        ValueError: if the layer brings no gradients.
    """
    if layer.fisher is None:
        raise ValueError("RSAVQ needs the layer's gradients")
    scores = channel_scores(layer.fisher)
    logs = torch.log2(1 + scores)
    if not bool(logs.sum() > 0):
        logs = torch.ones_like(logs)
    ranked = scores.argsort(stable=True).tensor_split(_GROUPS)
    groups = [part.sort().values for part in ranked]
    shares = torch.stack([logs[group].mean() for group in groups]) / logs.mean()
    setting = choose_setting(layer.weight, shares, target)
    values, codes = {}, []
    for i, (group, bits) in enumerate(zip(groups, setting.index_bits, strict=True)):
        vectors = _vectors(layer.weight[:, group], setting.dim)  # [1, N, d]
        even = torch.ones_like(vectors[0])
        table = kmeans.train(vectors, even, 2**bits, _ITERATIONS, generator).half().float()
        codes.append(kmeans.nearest(vectors, even, table)[0])
        values[f"codebooks.{i}"] = table[0]
    O, I = layer.weight.shape  # noqa: E741
    place = torch.cat(groups).argsort()
    decode = partial(_decode, codes, [len(group) for group in groups], place)
    return Quantized(values, decode, setting.stored_bits(O, I))


def _vectors(columns: Tensor, dim: int) -> Tensor:
    """Cut rows of `[O, n]` into vectors `[1, O * n/d, d]`, the last one of each padded."""
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % dim))
    return padded.reshape(1, -1, dim)


def _decode(codes: list[Tensor], widths: list[int], place: Tensor, values: Values) -> Tensor:
    parts = []
    for i, (code, width) in enumerate(zip(codes, widths, strict=True)):
        table = values[f"codebooks.{i}"]
        row = -(-width // table.shape[1]) * table.shape[1]
        parts.append(table[code].view(-1, row)[:, :width])
    return torch.cat(parts, dim=1)[:, place]
