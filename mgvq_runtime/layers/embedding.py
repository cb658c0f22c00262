"""Token tables, dense or quantized, and the head that shares one (used by `models`)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_runtime.layers.row_parts import SplitEmbedding
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


class HostEmbedding(nn.Embedding):
    """A dense table `[V, D]` in main memory for a model on another device.

    The rows that are asked for are gathered on the CPU and sent, so that a device holds none of it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rows_device: torch.device) -> None:
        """Make the table without weights; its rows go to `rows_device`."""
        super().__init__(vocab_size, hidden_size)
        self.rows_device = rows_device

    def pin(self) -> None:
        """Lock the filled table into memory where it lies: paged out, it would stall the device.

        `Tensor.pin_memory` would copy it and round up: 1,100 MiB took 2,074 (torch 2.11, H100).
        """
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self.weight.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, self.weight.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows `[T, D]` of `ids [T]` int64 on the CPU; sent, but not waited for."""
        shape, dtype = (ids.shape[0], self.embedding_dim), self.weight.dtype
        # Pinned memory is not handed out again before the copy out of it has ended.
        rows = torch.empty(shape, dtype=dtype, pin_memory=self.rows_device.type == "cuda")
        torch.index_select(self.weight, 0, ids, out=rows)
        return rows.to(self.rows_device, non_blocking=True)


Table = nn.Embedding | VQEmbedding | SplitEmbedding


class TiedHead(nn.Module):
    """The output head of a model whose head is its token table, read the other way round."""

    def __init__(self, embedding: Table) -> None:
        """Share a table; it stays the embedding's own parameter."""
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[R, V]` for `hidden [R, D]`."""
        return _project(hidden, self._embedding[0])


def _project(hidden: Tensor, table: nn.Module) -> Tensor:
    """Multiply by every row of a table: `[R, V]`."""
    if isinstance(table, SplitEmbedding):
        return torch.cat([_project(hidden, part) for part in table.parts], dim=-1)
    if isinstance(table, VQEmbedding):
        return ops.vq_linear(hidden, table.packed, None)
    assert isinstance(table, nn.Embedding)
    return F.linear(hidden, table.weight)
