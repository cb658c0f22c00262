"""VPTQ-like: vectors along the outputs of one input, one codebook a matrix, column after column.

The codebook is trained on the weights with each input's second moment as weight; columns are
quantized by falling second moment, each compensated by those before ("channel-independent"), so no
order has to be stored. Vector length and index bits are the largest whose codebook, at float16,
the target pays.

Source: VPTQ (arXiv 2409.17066). Left out: residual codebooks, outlier channels, normalization and
layer-wise training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from mgvq_quantizer.baselines import kmeans
from mgvq_quantizer.baselines.compensation import Compensation, blocks_from_last, factors_of
from mgvq_quantizer.baselines.interface import (
    FLOAT16_BITS,
    Layer,
    Quantized,
    Values,
    fits,
    refuse,
)

_DIMS = (8, 6, 4, 2)
_MAX_INDEX_BITS = 16
_ITERATIONS = 30
_MAX_TRAINING_VECTORS = 1 << 17


@dataclass(frozen=True)
class Setting:
    """Length and index bits of the vectors."""

    dim: int
    index_bits: int

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Count codes and the codebook; the last vector of a column may be padded."""
        vectors = -(-out_features // self.dim) * in_features
        return self.index_bits * vectors + FLOAT16_BITS * self.dim * 2**self.index_bits


def choose_setting(weight: Tensor, target: float) -> Setting:
    """Return the setting with most index bits a weight; of equal ones that with long vectors.

    Raises:
        NotDefined: if none fits.
    """
    O, I = weight.shape  # noqa: E741
    settings = [Setting(d, n) for d in _DIMS for n in range(_MAX_INDEX_BITS, 0, -1)]
    fitting = [s for s in settings if fits(s.stored_bits(O, I), O * I, target)]
    if not fitting:
        raise refuse("VPTQ", weight, target)
    return max(fitting, key=lambda setting: setting.index_bits / setting.dim)


def vptq(layer: Layer, target: float, generator: torch.Generator) -> Quantized:
    """Quantize with one codebook of vectors along the outputs.

    Args:
        layer: weight and second moment.
        target: bits a weight in full.
        generator: draws training vectors and the first codebook.

    Raises:
        NotDefined: if no setting fits.
    """
    weight, diagonal = layer.weight, layer.moment.diagonal()
    O, I = weight.shape  # noqa: E741
    setting = choose_setting(weight, target)
    order = diagonal.argsort(stable=True)  # settled from the last to the first
    factors = factors_of(layer.moment[order][:, order], 1)
    book = _train(weight, factors.matrix.diagonal()[order.argsort()], setting, generator)
    state = Compensation(weight[:, order], factors)
    codes = torch.empty(I, -(-O // setting.dim), dtype=torch.int64, device=weight.device)
    even = torch.ones(codes.shape[1], setting.dim, device=weight.device)
    for column in blocks_from_last(slice(0, I), 1):
        code = kmeans.nearest(_vectors(state.goal(column), setting.dim), even, book[None])[0]
        state.settle(column, book[code].reshape(-1, 1)[:O])
        codes[order[column]] = code
    return Quantized({"codebook": book}, partial(_decode, codes, O), setting.stored_bits(O, I))


def _train(
    weight: Tensor, importance: Tensor, setting: Setting, generator: torch.Generator
) -> Tensor:
    """Train the codebook `[K, d]`, in float16, on vectors weighted by their input's importance."""
    vectors = _vectors(weight, setting.dim)[0]  # [I * O/d, d], input by input
    weights = (importance / importance.mean()).to(weight)
    weights = weights.repeat_interleave(len(vectors) // len(weights))[:, None]
    vectors, weights = _sample(vectors, weights, generator)
    book = kmeans.train(
        vectors[None],
        weights.expand(-1, setting.dim),
        2**setting.index_bits,
        _ITERATIONS,
        generator,
    )[0]
    return book.half().float()


def _sample(vectors: Tensor, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return at most `_MAX_TRAINING_VECTORS` of `[N, d]` and their weights `[N, 1]`.

    Half of them are those with most energy, the others drawn from the rest and weighted for it: a
    single vector of a loud input can be most of what a matrix has to lose.
    """
    N = len(vectors)
    order = torch.randperm(N, generator=generator).to(vectors.device)
    if N > _MAX_TRAINING_VECTORS:
        half = _MAX_TRAINING_VECTORS // 2
        energy = weights[:, 0] * vectors.square().sum(1)
        heavy = energy.argsort(descending=True, stable=True)[:half]
        is_heavy = torch.zeros(N, dtype=torch.bool, device=vectors.device)
        is_heavy[heavy] = True
        drawn = order[~is_heavy[order]][:half]
        weights = torch.where(is_heavy[:, None], weights, weights * (N - half) / half)
        order = torch.cat([heavy, drawn])
    return vectors[order], weights[order]


def _vectors(columns: Tensor, dim: int) -> Tensor:
    """Cut columns `[O, n]` into vectors `[1, n * O/d, d]`, the last one of each padded."""
    padded = pad(columns.T, (0, -columns.shape[0] % dim))  # [n, O']
    return padded.reshape(1, -1, dim)


def _decode(codes: Tensor, out_features: int, values: Values) -> Tensor:
    return values["codebook"][codes].flatten(1)[:, :out_features].T
