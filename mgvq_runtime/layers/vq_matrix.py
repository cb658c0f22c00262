"""The quantized matrix behind a layer (the base of `linear.VQLinear` and `embedding.VQEmbedding`).

Holds one packed weight and checks that it is the one the layer was made for. What is done with it
is the layer's own.
"""

from __future__ import annotations

import torch
from torch import nn

from mgvq_kernels import ops
from mgvq_kernels.layout import PackedVQ, VQLayout, VQWeight


class VQMatrix(nn.Module):
    """A vector-quantized `W [O, I]`; `load` must come before `forward`."""

    packed: PackedVQ

    def __init__(self, out_features: int, in_features: int, layout: VQLayout) -> None:
        """Make the layer without its weight.

        Raises:
            ValueError: if the layout is of another shape.
        """
        super().__init__()
        if (layout.out_features, layout.in_features) != (out_features, in_features):
            raise ValueError(
                f"layout is [{layout.out_features}, {layout.in_features}], "
                f"the layer is [{out_features}, {in_features}]"
            )
        self.layout = layout

    def load(self, weight: VQWeight, device: torch.device | str = "cpu") -> None:
        """Pack a weight of this layer's layout for `device`, replacing the one before.

        Raises:
            ValueError: if the weight has another layout.
        """
        if weight.layout != self.layout:
            raise ValueError(
                f"the weight's layout {weight.layout} is not the layer's {self.layout}"
            )
        self.packed = ops.pack_for(weight, device)
