"""From a folder to a loaded model with every setting settled (called by `Engine.from_checkpoint`).

Order: device and type, a memory plan estimated from shapes, so that what cannot fit is refused
before it is loaded, weights, then on a GPU a real worst case is run and the plan is made again from
what was measured; the key/value pool gets what is left. Nothing is served here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.config import (
    EngineConfig,
    ModelFacts,
    ResolvedConfig,
    resolve_device,
    resolve_dtype,
    resolve_model_len,
)
from mgvq_runtime.engine.decode_graphs import decode_batch_sizes
from mgvq_runtime.engine.memory import weights_bytes
from mgvq_runtime.engine.memory_demand import (
    available_bytes,
    checkpoint_bytes,
    estimated_demand,
    measured_demand,
    model_facts,
    movable_table_bytes,
    worst_patches,
)
from mgvq_runtime.engine.memory_plan import MemoryDemand, MemoryPlan, plan_memory
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model, model_config
from mgvq_runtime.multimodal.chat import ChatProcessor


class Started(NamedTuple):
    """What an engine is made of."""

    model: CausalLM
    chat_processor: ChatProcessor
    config: ResolvedConfig
    plan: MemoryPlan


class Plannable(NamedTuple):
    """A checkpoint that is open but not loaded, and all that is needed to plan for it."""

    checkpoint: Checkpoint
    chat_processor: ChatProcessor
    facts: ModelFacts
    device: str
    dtype: str

    def decode_batch_sizes(self, config: EngineConfig) -> tuple[int, ...]:
        """Return the batch sizes of decode steps to record; none where they run eagerly."""
        if config.enforce_eager:
            return ()
        return decode_batch_sizes(self.device, self.dtype, config.max_num_seqs)

    def plan(self, config: EngineConfig, available: int, weights: int | None = None) -> MemoryPlan:
        """Estimate and divide.

        Args:
            config: What the user said.
            available: Bytes that are free.
            weights: Bytes of the weights where they are known, None to count the checkpoint's.

        Raises:
            ConfigError: if a single request would not fit.
        """
        width = getattr(torch, self.dtype).itemsize
        demand = estimated_demand(
            config,
            self.chat_processor.config,
            self.chat_processor.image_processor,
            resolve_model_len(config, self.facts),
            width,
            available,
            checkpoint_bytes(self.checkpoint, width) if weights is None else weights,
            self.decode_batch_sizes(config),
        )
        return self.divide(config, demand)

    def divide(self, config: EngineConfig, demand: MemoryDemand) -> MemoryPlan:
        """Divide what a device has; the token table may go to main memory where that helps.

        Raises:
            ConfigError: as `plan`, or if the token table cannot go where the user wants it.
        """
        shapes, device = self.chat_processor.config, torch.device(self.device)
        width = getattr(torch, self.dtype).itemsize
        table = movable_table_bytes(config, self.checkpoint, shapes, device, width)
        demand = replace(demand, table_bytes=table)
        return plan_memory(config, self.facts, self.device, self.dtype, demand)


def open_for_planning(path: str | Path | None, config: EngineConfig, device: str) -> Plannable:
    """Read everything but the weights.

    Args:
        path: Checkpoint folder; None takes the config's, then the bundled one.
        config: What the user said.
        device: "cpu" or "cuda:N"; need not be there.

    Raises:
        CheckpointError: if the folder is missing, damaged or not ours.
        ConfigError: if a file in it makes no sense.
    """
    checkpoint = open_checkpoint(Path(path or config.checkpoint or demo_checkpoint_path()))
    shapes = model_config(checkpoint)
    processor = ChatProcessor.from_checkpoint(
        checkpoint, shapes, config.max_image_tokens, config.image_cache_bytes
    )
    facts = model_facts(shapes, checkpoint.quantization is not None)
    dtype = resolve_dtype(config.dtype, device, facts.is_quantized)
    return Plannable(checkpoint, processor, facts, device, dtype)


def start(path: str | Path | None, config: EngineConfig) -> Started:
    """Load model and processors and resolve the settings.

    Args:
        path: Checkpoint folder; None takes the config's, then the bundled one.
        config: What the user said.

    Raises:
        CheckpointError: if the folder is missing, damaged or not ours.
        ConfigError: if the settings do not fit this model or this machine.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    opened = open_for_planning(
        path, config, resolve_device(config.device, torch.cuda.device_count())
    )
    device = torch.device(opened.device)
    available = available_bytes(device)
    plan = opened.plan(config, available)
    dtype, on_host = getattr(torch, opened.dtype), plan.host_bytes > 0
    model = fill_model(opened.checkpoint, device, dtype, on_host)
    images = opened.chat_processor.image_processor
    if device.type == "cuda":
        sizes = opened.decode_batch_sizes(config)
        demand = measured_demand(
            model, images, config, plan.max_model_len, available, sizes, plan.host_bytes
        )
        settled = replace(config, embedding_device="host" if on_host else "device")
        plan = opened.divide(settled, demand)
    else:
        plan = opened.plan(config, available, weights_bytes(model))
    model.set_context_length(plan.max_model_len)
    patches = config.max_batch_patches
    resolved = ResolvedConfig(
        device=opened.device,
        dtype=opened.dtype,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        decode_batch_sizes=opened.decode_batch_sizes(config),
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        kv_cache_dtype=plan.kv_cache_dtype,
        num_kv_blocks=plan.num_kv_blocks,
        max_batch_patches=patches if images is None else worst_patches(config, images.max_grid),
        image_cache_bytes=config.image_cache_bytes,
        seed=config.seed,
        deterministic=config.deterministic,
        speculation=config.n_gram_speculation,
    )
    return Started(model, opened.chat_processor, resolved, plan)
