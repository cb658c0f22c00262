"""The mean error of a rounded linear layer, put into the bias that it has (called by `stream`).

`W x + b` became `What x + b`. Over calibration tokens the error of each output has a mean, and that
much the bias can give back exactly: the part of the error's energy that is the same for all tokens.
Row scales are refitted in `solver`. Layers without a bias get none.

Source: method memo D.6; KBVQ-MoE (arXiv 2602.11184).
"""

from __future__ import annotations

from torch import Tensor


def mean_error(weight: Tensor, quantized: Tensor, mean_input: Tensor) -> Tensor:
    """Return `mean (W - What) x` over tokens.

    Args:
        weight: `[O, I]`.
        quantized: `[O, I]`: what stands in for it.
        mean_input: `[I]` float64.

    Returns:
        `[O]` float64, to be added to the bias.
    """
    return (weight.double() - quantized.double()) @ mean_input
