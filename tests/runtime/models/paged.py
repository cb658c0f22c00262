"""A paged cache in miniature, for tests: what the engine does to run a batch, with nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.multimodal.prompt import mrope_positions
from mgvq_runtime.request import ImageInput

Grid = tuple[int, int, int]


@dataclass
class Running:
    """One request: its tokens' embeddings and positions, and how far it has run."""

    ids: list[int]
    embeds: Tensor
    positions: Tensor
    delta: int
    blocks: list[int] = field(default_factory=list)
    num_done: int = 0

    def append(self, model: CausalLM, token: int) -> None:
        position = len(self.ids) + self.delta
        self.ids.append(token)
        self.embeds = torch.cat((self.embeds, model.embed(torch.tensor([token]))))
        new = torch.full((3, 1), position)
        self.positions = torch.cat((self.positions, new), dim=1)


def start(model: CausalLM, ids: Sequence[int], patches: Tensor, grids: Sequence[Grid]) -> Running:
    """Embed a prompt, its images included."""
    config = model.config
    merge = config.vision_config.spatial_merge_size
    positions, delta = mrope_positions(ids, grids, config.placeholder_ids, merge)
    token_ids = torch.tensor(ids)
    embeds = model.embed(token_ids).clone()
    if grids:
        embeds[token_ids == config.image_token_id] = model.encode_images(patches, grids)
    return Running(list(ids), embeds, torch.from_numpy(positions), delta)


def start_with_images(model: CausalLM, ids: Sequence[int], images: Sequence[ImageInput]) -> Running:
    """Embed a prompt of a family whose positions count up."""
    token_ids = torch.tensor(ids)
    embeds = model.embed(token_ids).clone()
    if images:
        patches = torch.cat([torch.from_numpy(image.patches) for image in images])
        grids = [image.grid_thw for image in images]
        rows = model.encode_images(patches, grids, [image.layout for image in images])
        embeds[token_ids == model.config.image_token_id] = rows
    return Running(list(ids), embeds, torch.arange(len(ids)).expand(3, -1), 0)


class PagedRunner:
    """Owns caches and free blocks; blocks are given out in a shuffled order."""

    def __init__(self, model: CausalLM, num_blocks: int = 96, block_size: int = 4) -> None:
        text = model.config.text_config
        shape = (num_blocks, block_size, text.num_key_value_heads, text.head_dim)
        self.model, self.block_size = model, block_size
        layers = range(text.num_hidden_layers)
        # NaN everywhere: a read of a slot that was never written shows.
        self.caches = [
            LayerCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in layers
        ]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
        self.free = order.tolist()

    def step(self, work: Sequence[tuple[Running, int]]) -> list[Tensor]:
        """Run the next `count` tokens of each sequence in one forward; logits of each."""
        slots, bounds, contexts = [], [0], []
        for sequence, count in work:
            context = sequence.num_done + count
            while len(sequence.blocks) * self.block_size < context:
                sequence.blocks.append(self.free.pop())
            for i in range(sequence.num_done, context):
                block = sequence.blocks[i // self.block_size]
                slots.append(block * self.block_size + i % self.block_size)
            bounds.append(bounds[-1] + count)
            contexts.append(context)
        width = max(len(sequence.blocks) for sequence, _ in work)
        table = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            table[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
        spans = [(s, slice(s.num_done, s.num_done + count)) for s, count in work]
        batch = ForwardBatch(
            positions=torch.cat([s.positions[:, span] for s, span in spans], dim=1),
            cu_seqlens_q=tuple(bounds),
            context_lens=tuple(contexts),
            block_table=table,
            slot_mapping=torch.tensor(slots),
            kv_cache=self.caches,
        )
        hidden = self.model(torch.cat([s.embeds[span] for s, span in spans]), batch)
        logits = self.model.logits(hidden)
        for sequence, count in work:
            sequence.num_done += count
        return list(logits.split([count for _, count in work]))
