"""Per-sample gradients of one matrix, and the Kronecker curvature they span (called by `gate`).

The gradient of a sample's loss is `G_s = sum_t g_t x_t^T` `[O, I]`, kept as its two sides: inputs
`x` and gradients at the outputs `g`, so that it costs a block's activations and no matrix a sample.
The curvature of the mean loss is `E_s[vec G_s vec G_s^T] ~ c (B x A)`: `A` belongs to the inputs
and is what `statistics` counts, `B` to the outputs, and `c` sets the scale of the product.
Not here: where the gradients come from (`gradients`), what is done with them (`shift`, `gate`).

Source: method memo B.2 `seq`, C.1, C.6; YAQA (Cornell-RelaxML/yaqa), Sketch B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SampleGradients:
    """The gradients `G_s` of one matrix, one a sample; sums over a sample's tokens, not means."""

    inputs: tuple[Tensor, ...]
    """`[T, I]` a sample: what entered the matrix."""
    outputs: tuple[Tensor, ...]
    """`[T, O]` a sample: the gradient of the sample's loss at what left it."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return inputs `[T, I]` and output gradients `[T, O]`, sample by sample."""
        return zip(self.inputs, self.outputs, strict=True)

    def products(self, change: Tensor) -> Tensor:
        """Return `<G_s, change>`: how much a change of the weight moves each sample's loss.

        Args:
            change: `[O, I]`.

        Returns:
            `[S]` float64, to first order.
        """
        return torch.stack([((x @ change.to(x).T) * g).double().sum() for x, g in self.pairs()])


def output_factor(gradients: SampleGradients, shrink: float) -> Tensor:
    """Return the output side of the curvature, `B = E_s[G_s G_s^T] / I`, pulled to the identity.

    Args:
        gradients: of one matrix.
        shrink: share `r` of the identity: `(1 - r) B + r tr(B)/O`; 1 leaves nothing of B.

    Returns:
        `[O, O]` float64, symmetric; the identity where every gradient is zero.

    Source: method memo B.2.
    """
    products = (g.T @ ((x @ x.T) @ g) for x, g in gradients.pairs())
    total = sum(product.double() for product in products)
    assert isinstance(total, Tensor), "gradients of no sample have no curvature"
    factor = (total + total.T) / (2 * len(gradients) * gradients.inputs[0].shape[1])
    eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    mean = float(factor.diagonal().mean())
    return (1 - shrink) * factor + shrink * mean * eye if mean > 0.0 else eye


def kronecker_scale(gradients: SampleGradients, A: Tensor, B: Tensor) -> float:
    """Return the `c` with which `c (B x A)` is nearest to the curvature of the gradients.

    Args:
        gradients: of one matrix.
        A: `[I, I]` the input side, of any scale.
        B: `[O, O]` the output side, of any scale.

    Returns:
        `E_s[tr(G_s^T B G_s A)] / (|A|^2 |B|^2)`, Frobenius norms.

    Source: method memo B.2.
    """
    total = 0.0
    for x, g in gradients.pairs():
        inner = (x @ A.to(x)) @ x.T  # [T, T]
        outer = (g @ B.to(g)) @ g.T  # [T, T]
        total += float((inner * outer).double().sum())
    norms = float(A.double().square().sum()) * float(B.double().square().sum())
    return total / (len(gradients) * norms)
