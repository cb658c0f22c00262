"""LDLQ with the E8P codebook after random Hadamard turns of both sides (like QuIP#, untuned).

Turned weights look normal whatever the layer, so one fixed codebook and one scale a matrix serve:
2 bits, or 3 with a second, coarser step on what the first leaves. Stored beside the codes: the
signs of both turns, a bit each, and the scale. Other rates are not defined.

Source: QuIP# (arXiv 2402.04396), without its fine-tuning and without rescaling the inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mgvq_quantizer.baselines import e8p
from mgvq_quantizer.baselines.compensation import Compensation, blocks_from_last, factors_of
from mgvq_quantizer.baselines.hadamard import Turn
from mgvq_quantizer.baselines.interface import (
    FLOAT16_BITS,
    Layer,
    Quantized,
    Values,
    fits,
    refuse,
)

_SCALES = {3: 0.98, 2: e8p.SCALE}
"""By bits, the points a unit of the weights' root mean square: of .90 to 1.08 the least error on a
normal source, .0296 a weight at 3 bits (.0301 at 1.03)."""
_SECOND_SCALE = 2.0
"""How much finer the second step is: the least error of 1.6 to 3."""


def stored_bits(bits: int, out_features: int, in_features: int) -> int:
    """Count codes, the signs of both turns and the scale of a matrix."""
    return bits * out_features * in_features + out_features + in_features + FLOAT16_BITS


def quip(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
    """Quantize with fixed lattice codebooks in turned coordinates.

    Args:
        layer: weight and second moment.
        target: bits a weight in full.
        generator: draws the signs of the turns.

    Raises:
        NotDefined: if neither 2 nor 3 bits fit, or the width is no multiple of 8.
    """
    weight = layer.weight
    O, I = weight.shape  # noqa: E741
    fitting = [bits for bits in _SCALES if fits(stored_bits(bits, O, I), O * I, target)]
    if not fitting or I % e8p.DIM:
        raise refuse("E8P", weight, target)
    left, right = Turn.random(O, generator), Turn.random(I, generator)
    turned = right.forward(left.forward(weight.T).T)
    moment = right.forward(right.forward(layer.moment).T)
    bits = fitting[0]
    scale = (turned.square().mean().sqrt() / _SCALES[bits]).half().float()
    if not scale > 0:
        scale = torch.ones_like(scale)
    state = Compensation(turned / scale, factors_of(moment, e8p.DIM))
    for columns in blocks_from_last(slice(0, I), e8p.DIM):
        state.settle(columns, _round(state.goal(columns), bits))
    return Quantized(
        {"scale": scale},
        partial(_decode, state.value, left, right),
        stored_bits(bits, O, I),
    )


def _round(vectors: Tensor, bits: int) -> Tensor:
    """Return the points `[O, 8]` that stand for vectors in the lattice's units."""
    points = e8p.nearest(vectors)
    if bits == 3:
        table = e8p.one_bit_points().to(vectors) / _SECOND_SCALE
        points = points + table[torch.cdist(vectors - points, table).argmin(1)]
    return points


def _decode(points: Tensor, left: Turn, right: Turn, values: Values) -> Tensor:
    return left.backward(right.backward(values["scale"] * points).T).T
