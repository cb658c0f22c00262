"""Token tables and heads whose rows are stored in parts (used by `layers.linear` and `models`).

Each part is a run of rows and a matrix of its own with its own bits: any table or linear layer. How
parts are called is `checkpoint.row_parts`' business, who cuts where the quantizer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class SplitEmbedding(nn.Module):
    """A token table in parts; `starts` says where each begins, and the last one ends."""

    def __init__(self, parts: Iterable[nn.Module], sizes: Sequence[int]) -> None:
        """Take the parts, first rows first, and the rows of each."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.starts = tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows `[T, D]` of `ids [T]` int64.

        Every part decodes a row for every id, its own or its first: to look at ids on the host
        would stall a GPU.
        """
        found: Tensor | None = None
        for part, (start, end) in zip(self.parts, pairwise(self.starts), strict=True):
            is_here = (ids >= start) & (ids < end)  # [T]
            rows = part(torch.where(is_here, ids - start, 0))  # [T, D]
            found = rows if found is None else torch.where(is_here[:, None], rows, found)
        assert found is not None, "a table has a part"
        return found


class SplitLinear(nn.Module):
    """An output head in parts."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        """Take the parts, first rows first."""
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[R, V]` for `hidden [R, D]`."""
        return torch.cat([part(hidden) for part in self.parts], dim=-1)
