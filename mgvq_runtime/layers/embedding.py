"""Token tables, dense or quantized, and the head that shares one (used by `models`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_runtime.layers.vq_matrix import VQMatrix


class VQEmbedding(VQMatrix):
    """Rows of a vector-quantized table `[V, D]`; `load` must come before `forward`."""

    def __init__(self, vocab_size: int, hidden_size: int, layout: VQLayout) -> None:
        """Make the table without weights.

        Raises:
            ValueError: if the layout is of another shape.
        """
        super().__init__(vocab_size, hidden_size, layout)
        self.dtype = torch.get_default_dtype()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows `[T, D]` of `ids [T]` int64, in `self.dtype`."""
        return ops.vq_embedding(ids, self.packed, self.dtype)


class TiedHead(nn.Module):
    """The output head of a model whose head is its token table, read the other way round."""

    def __init__(self, embedding: nn.Embedding | VQEmbedding) -> None:
        """Share a table; it stays the embedding's own parameter."""
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[R, V]` for `hidden [R, D]`."""
        embedding = self._embedding[0]
        if isinstance(embedding, VQEmbedding):
            return ops.vq_linear(hidden, embedding.packed, None)
        return F.linear(hidden, embedding.weight)
