"""Runs the graph on what the scheduler chose (called by `Engine.step`).

Encodes pictures, builds one `ForwardBatch` from chunks of sequences, puts picture embeddings in
place of their placeholders, and returns logits for the rows that need them, and for no other. Who
runs is decided by `scheduler`, which token comes next by `sampler`.

A product of matrices rounds a row differently in other company: libraries choose their order of
summation by the number of rows, and so does attention by the number of queries. With
`config.deterministic` each token is therefore run by itself, and each picture encoded by itself:
whatever a library does, it does the same for the same token with the same context.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from mgvq_runtime.cache.kv_cache import KVCache
from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.config import ResolvedConfig
from mgvq_runtime.engine.decode_graphs import DecodeGraphs
from mgvq_runtime.engine.scheduler import Chunk, Step
from mgvq_runtime.engine.sequence import ImageKey
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput


class ModelRunner:
    """A model, its key/value pool and picture embeddings, and the way from chunks to logits."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        image_cache: LRUCache[ImageKey, torch.Tensor],
        config: ResolvedConfig,
        decode_graphs: DecodeGraphs | None = None,
    ) -> None:
        """Run `model` over the caches; all are on the device of `config`, in its type.

        Steps of one token a request go through `decode_graphs`, recorded of the same model and
        cache, where there are some.
        """
        self.model = model
        self.kv_cache = kv_cache
        self.decode_graphs = decode_graphs
        self._image_cache = image_cache
        self._vocab_size = model.config.text_config.vocab_size
        self._block_size = config.block_size
        self._max_patches = config.max_batch_patches
        self._is_deterministic = config.deterministic
        self._device = torch.device(config.device)
        self._dtype = getattr(torch, config.dtype)

    def encode_images(self, step: Step) -> None:
        """Encode a step's pictures, keep them, and hand them to the sequences that read them."""
        if not step.images:
            return
        images = list(step.images.values())
        runs = [[image] for image in images] if self._is_deterministic else [images]
        parts = [part for run in runs for part in self._encode(run)]
        encoded = dict(zip(step.images, parts, strict=True))
        for key, part in encoded.items():
            self._image_cache.put(key, part, part.numel() * part.element_size())
        for chunk in step.chunks:
            sequence = chunk.sequence
            for index in sequence.images_between(chunk.start, chunk.end):
                if index not in sequence.image_embeds:
                    sequence.image_embeds[index] = encoded[sequence.image_key(index)]

    def run(self, chunks: Items[Chunk]) -> torch.Tensor:
        """Run all chunks, in one forward unless tokens are to be run by themselves.

        Returns:
            `[R, V]` float32 logits of the R rows of all chunks (`Chunk.num_rows`), in order.
        """
        if not self._is_deterministic:
            return self._forward(chunks)
        return torch.cat([self._forward([one]) for chunk in chunks for one in chunk.tokens()])

    def _encode(self, images: Items[ImageInput]) -> list[torch.Tensor]:
        """Run pictures through the vision tower; each one's rows `[num_tokens, D]`."""
        patches = torch.from_numpy(np.concatenate([image.patches for image in images]))
        embeds = self.model.encode_images(
            patches.to(self._device, self._dtype),
            [image.grid_thw for image in images],
            [image.layout for image in images],
            self._max_patches,
        )  # [N, D]
        parts = torch.split(embeds, [image.num_tokens for image in images])
        # A part of its own memory: a view would keep its neighbours alive.
        return [part.clone() for part in parts]

    def _forward(self, chunks: Items[Chunk]) -> torch.Tensor:
        """Run chunks together and return `[R, V]` float32 logits of their rows."""
        input_ids, batch = self._batch(chunks)
        embeds = self._embed(chunks, input_ids, batch.cu_seqlens_q)  # [T, D]
        ends = batch.cu_seqlens_q[1:]
        rows = [
            row
            for end, chunk in zip(ends, chunks, strict=True)
            for row in range(end - chunk.num_rows, end)
        ]
        if self.decode_graphs is not None and len(chunks) == batch.num_tokens:
            logits = self.decode_graphs.run(embeds, batch)  # [R, V]
            return logits if len(rows) == len(logits) else logits[rows]
        hidden = self.model(embeds, batch)  # [T, D]
        if not rows:
            return hidden.new_empty((0, self._vocab_size), dtype=torch.float32)
        return self.model.logits(hidden if len(rows) == len(hidden) else hidden[rows])

    def _batch(self, chunks: Items[Chunk]) -> tuple[torch.Tensor, ForwardBatch]:
        """Lay the chunks end to end; returns token ids `[T]` int64 and what the layers need."""
        cu_seqlens = [0]
        for chunk in chunks:
            cu_seqlens.append(cu_seqlens[-1] + chunk.end - chunk.start)
        packed = np.empty((5, cu_seqlens[-1]), dtype=np.int64)  # ids, 3 positions, slot
        width = max(-(-chunk.end // self._block_size) for chunk in chunks)
        table = np.zeros((len(chunks), width), dtype=np.int32)  # [R, max_blocks]
        for row, chunk in enumerate(chunks):
            blocks = chunk.sequence.block_table[:width]
            table[row, : len(blocks)] = blocks
            columns = packed[:, cu_seqlens[row] : cu_seqlens[row + 1]]
            if chunk.end - chunk.start == 1:
                self._fill_one(columns, chunk)
            else:
                self._fill_many(columns, chunk, table[row])
        on_host = torch.from_numpy(packed)
        tensors = on_host.to(self._device)
        batch = ForwardBatch(
            positions=tensors[1:4],
            cu_seqlens_q=tuple(cu_seqlens),
            context_lens=tuple(chunk.end for chunk in chunks),
            block_table=torch.from_numpy(table).to(self._device),
            slot_mapping=tensors[4],
            kv_cache=self.kv_cache.layers,
        )
        return (on_host if self.model.ids_device.type == "cpu" else tensors)[0], batch

    def _fill_one(self, columns: np.ndarray, chunk: Chunk) -> None:
        """Write id, positions and slot of one token, without an array in between."""
        sequence, index = chunk.sequence, chunk.start
        prompt = sequence.request.prompt
        block, offset = divmod(index, self._block_size)
        columns[0, 0] = chunk.token_ids[0]
        if index < sequence.num_prompt_tokens:
            columns[1:4, 0] = prompt.positions[:, index]
        else:
            columns[1:4, 0] = index + prompt.position_delta
        columns[4, 0] = sequence.block_table[block] * self._block_size + offset

    def _fill_many(self, columns: np.ndarray, chunk: Chunk, blocks: np.ndarray) -> None:
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        indices = np.arange(start, end)
        columns[0] = chunk.token_ids
        columns[1:4] = sequence.positions(start, end)
        columns[4] = blocks[indices // self._block_size] * self._block_size
        columns[4] += indices % self._block_size

    def _embed(
        self, chunks: Items[Chunk], input_ids: torch.Tensor, cu_seqlens: Items[int]
    ) -> torch.Tensor:
        """Return token embeddings with those of pictures in their places; `[T, D]`."""
        embeds = self.model.embed(input_ids)
        for begin, chunk in zip(cu_seqlens, chunks, strict=False):
            sequence = chunk.sequence
            low, high = sequence.placeholder_range(chunk.start, chunk.end)
            if low == high:
                continue
            pictures = sequence.images_between(chunk.start, chunk.end)
            rows = torch.cat([sequence.image_embeds[index] for index in pictures])
            first = low - (int(sequence.image_ends[pictures[0] - 1]) if pictures[0] else 0)
            places = sequence.placeholders[low:high] - chunk.start + begin
            index = torch.from_numpy(places).to(self._device)
            embeds[index] = rows[first : first + high - low].to(embeds.dtype)
        return embeds
