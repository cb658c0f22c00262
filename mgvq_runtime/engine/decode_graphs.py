"""Decode steps recorded once and replayed: one launch, not hundreds (called by `model_runner`).

A step that gives every request one token does the same work each time, so it is recorded at the
start for a few batch sizes. What differs from step to step lies in buffers that a recording reads:
embeddings, positions, slots, block tables, lengths. A batch between two sizes is filled up with
rows that write to the dummy block. Embedding stays outside, so that rows of pictures and of a table
in main memory come in alike; so do prompts and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_runtime.cache.block_manager import DUMMY_BLOCK
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.causal_lm import CausalLM


class Recorder(Protocol):
    """Takes work on fixed tensors down, to be done again."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work` at least once; return what does it again, on the same memory."""


class CudaRecorder:
    """Records CUDA graphs; all share one pool of memory, so no two may run at the same time."""

    def __init__(self, device: torch.device) -> None:
        """Record on `device`, a GPU."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work`, capture it, return the graph's replay."""
        with torch.cuda.device(self._device):
            work()  # compiles kernels and makes workspaces, which a capture may not
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        return graph.replay


class DecodeGraphs:
    """The recordings of one model over one cache, and the buffers they read and write."""

    @torch.inference_mode()
    def __init__(
        self,
        model: CausalLM,
        kv_cache: Sequence[LayerCache],
        batch_sizes: Sequence[int],
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        """Record a step of each size; model and cache must stay where they are.

        Args:
            model: Loaded, its context length set.
            kv_cache: What the layers keep their keys and values in.
            batch_sizes: Requests of each recording, ascending.
            max_model_len: Most tokens of a request, which fixes the width of the block tables.
            recorder: What takes the steps down.
        """
        most, text, device = batch_sizes[-1], model.config.text_config, model.device
        block_size = kv_cache[0][0].shape[1]
        self.batch_sizes = tuple(batch_sizes)
        self._model, self._kv_cache = model, kv_cache
        self._dummy_slot = DUMMY_BLOCK * block_size

        def buffer(*shape: int, dtype: torch.dtype, padding: int = 0) -> Tensor:
            return torch.full(shape, padding, dtype=dtype, device=device)

        self._embeds = buffer(most, text.hidden_size, dtype=model.dtype)
        self._positions = buffer(3, most, dtype=torch.int64)
        self._slot_mapping = buffer(most, dtype=torch.int64, padding=self._dummy_slot)
        width = -(-max_model_len // block_size)
        self._block_table = buffer(most, width, dtype=torch.int32, padding=DUMMY_BLOCK)
        self._context_lens = buffer(most, dtype=torch.int32, padding=1)
        self._logits = buffer(most, text.vocab_size, dtype=torch.float32)
        # The largest first: the smaller ones then find its memory in the pool.
        self._replays = {
            size: recorder(partial(self._step, size)) for size in reversed(self.batch_sizes)
        }

    @property
    def num_bytes(self) -> int:
        """Size of the buffers; what the recordings hold besides, only a GPU knows."""
        buffers = [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in buffers)

    def run(self, embeds: Tensor, batch: ForwardBatch) -> Tensor:
        """Run a step of one token a request.

        Args:
            embeds: `[R, D]`, R at most the largest recorded size.
            batch: As for the model; its cache is the recorded one.

        Returns:
            `[R, V]` float32 logits.
        """
        R = len(embeds)
        assert batch.context_lens is not None, "a step that is replayed goes through the cache"
        assert batch.block_table is not None, "a step that is replayed goes through the cache"
        assert batch.slot_mapping is not None, "a step that is replayed goes through the cache"
        size = next(size for size in self.batch_sizes if size >= R)
        _fill(self._embeds[:size], embeds, 0)
        _fill(self._positions[:, :size].t(), batch.positions.t(), 0)
        _fill(self._slot_mapping[:size], batch.slot_mapping, self._dummy_slot)
        _fill(self._context_lens[:size], torch.tensor(batch.context_lens, dtype=torch.int32), 1)
        # Entries beyond a request's own blocks are those of an older step; nobody reads them.
        width = batch.block_table.shape[1]
        _fill(self._block_table[:size, :width], batch.block_table, DUMMY_BLOCK)
        self._replays[size]()
        return self._logits[:R].clone()  # the next replay writes there again

    def _step(self, size: int) -> None:
        """Do one step of `size` requests, from buffers to a buffer."""
        batch = ForwardBatch(
            positions=self._positions[:, :size],
            cu_seqlens_q=tuple(range(size + 1)),
            context_lens_tensor=self._context_lens[:size],
            block_table=self._block_table[:size],
            slot_mapping=self._slot_mapping[:size],
            kv_cache=self._kv_cache,
        )
        hidden = self._model(self._embeds[:size], batch)  # [size, D]
        self._logits[:size].copy_(self._model.logits(hidden))


def decode_batch_sizes(device: str, dtype: str, max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes to record: 1, 2, 4, 8, ... and `max_num_seqs`.

    Args:
        device: "cpu" or "cuda:N".
        dtype: Of activations and cache.
        max_num_seqs: Most requests of a step.

    Returns:
        None at all where a step cannot be recorded: on a CPU, without Triton, and in float32, for
        which attention reads its lengths on the host.
    """
    if device == "cpu" or dtype == "float32" or not ops.has_triton():
        return ()
    powers = (1 << i for i in range(max_num_seqs.bit_length()))
    return (*(size for size in powers if size < max_num_seqs), max_num_seqs)


def _fill(rows: Tensor, values: Tensor, padding: int) -> None:
    """Put `values` in the first rows and `padding` in the others."""
    rows[: len(values)].copy_(values)
    rows[len(values) :].fill_(padding)
