"""Linear layers, dense or quantized, and the factory that chooses by name (used by `models`).

A layer is its parameters and one kernel call. Reading files is `models.loading`'s business, packing
and the choice of a kernel are `mgvq_kernels`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_runtime.checkpoint.row_parts import part_name
from mgvq_runtime.layers.embedding import HostEmbedding, Table, VQEmbedding
from mgvq_runtime.layers.row_parts import SplitEmbedding, SplitLinear
from mgvq_runtime.layers.vq_matrix import VQMatrix


class VQLinear(VQMatrix):
    """`x @ W.T + bias` with a vector-quantized `W [O, I]`; `load` must come before `forward`."""

    def __init__(
        self, in_features: int, out_features: int, layout: VQLayout, bias: bool = False
    ) -> None:
        """Make the layer without weights.

        Args:
            in_features: I.
            out_features: O.
            layout: Bands and stages of `W`.
            bias: Whether a bias `[O]` is added.

        Raises:
            ValueError: if the layout is of another shape.
        """
        super().__init__(out_features, in_features, layout)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """Return `[..., O]` in the dtype of `x [..., I]`, or of `[..., 2 I]` that is `gated` first.

        Args:
            x: Activations.
            gated: Whether x is gate and up, whose `swiglu` is multiplied.
        """
        return ops.vq_linear(x, self.packed, self.bias, gated=gated)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LayerFactory:
    """Makes a layer quantized where `layouts` names it, dense everywhere else."""

    def __init__(
        self,
        layouts: Mapping[str, VQLayout] | None = None,
        rows_device: torch.device | None = None,
        row_parts: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Say what is quantized and where token tables lie.

        Args:
            layouts: Those of the quantized matrices by module name; None makes a dense model.
            rows_device: Where rows of dense token tables go, which then lie in main memory; None
                leaves tables beside the model.
            row_parts: Rows of each part of what is stored in parts, by module name.
        """
        self.layouts = dict(layouts or {})
        self.rows_device = rows_device
        self.row_parts = dict(row_parts or {})

    def linear(
        self, name: str, in_features: int, out_features: int, bias: bool = False
    ) -> nn.Linear | VQLinear:
        """Make the linear layer that the checkpoint calls `name`, its weights not filled yet.

        Raises:
            ValueError: if the layout of `name` has another shape.
        """
        layout = self.layouts.get(name)
        if layout is not None:
            return VQLinear(in_features, out_features, layout, bias)
        linear = nn.Linear(in_features, out_features, bias=bias)
        return linear.requires_grad_(False)

    def head(self, name: str, hidden_size: int, vocab_size: int) -> nn.Module:
        """Make the output head that the checkpoint calls `name`, whole or in parts.

        Raises:
            ValueError: if a layout has another shape.
        """
        if (sizes := self.row_parts.get(name)) is None:
            return self.linear(name, hidden_size, vocab_size)
        return SplitLinear(
            self.linear(part_name(name, i), hidden_size, rows) for i, rows in enumerate(sizes)
        )

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Table:
        """Make the embedding table that the checkpoint calls `name`, whole or in parts.

        Raises:
            ValueError: if the layout of `name` has another shape.
        """
        if (sizes := self.row_parts.get(name)) is not None:
            parts = [
                self.embedding(part_name(name, i), rows, hidden_size)
                for i, rows in enumerate(sizes)
            ]
            return SplitEmbedding(parts, sizes)
        layout = self.layouts.get(name)
        if layout is not None:
            return VQEmbedding(vocab_size, hidden_size, layout)
        embedding = (
            nn.Embedding(vocab_size, hidden_size)
            if self.rows_device is None
            else HostEmbedding(vocab_size, hidden_size, self.rows_device)
        )
        return embedding.requires_grad_(False)
