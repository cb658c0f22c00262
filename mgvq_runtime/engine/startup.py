"""From a folder to a loaded model with every setting settled (called by `Engine.from_checkpoint`).

Order: device and type, a memory plan estimated from shapes, so that what cannot fit is refused
before it is loaded, weights, then on a GPU a real worst case is run and the plan is made again from
what was measured; the key/value pool gets what is left. Nothing is served here.
"""

from __future__ import annotations

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
from mgvq_runtime.engine.memory import weights_bytes
from mgvq_runtime.engine.memory_demand import (
    available_bytes,
    checkpoint_bytes,
    estimated_demand,
    measured_demand,
    worst_patches,
)
from mgvq_runtime.engine.memory_plan import MemoryPlan, plan_memory
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
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
        )
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
    model = fill_model(opened.checkpoint, device, getattr(torch, opened.dtype))
    images = opened.chat_processor.image_processor
    if device.type == "cuda":
        demand = measured_demand(model, images, config, plan.max_model_len, device, available)
        plan = plan_memory(config, opened.facts, opened.device, opened.dtype, demand)
    else:
        plan = opened.plan(config, available, weights_bytes(model))
    model.set_context_length(plan.max_model_len)
    patches = config.max_batch_patches
    resolved = ResolvedConfig(
        device=opened.device,
        dtype=opened.dtype,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        num_kv_blocks=plan.num_kv_blocks,
        max_batch_patches=patches if images is None else worst_patches(config, images.max_grid),
        image_cache_bytes=config.image_cache_bytes,
        seed=config.seed,
        deterministic=config.deterministic,
        speculation=config.n_gram_speculation,
    )
    return Started(model, opened.chat_processor, resolved, plan)


def model_facts(config: ModelConfig, is_quantized: bool) -> ModelFacts:
    """Return what planning must know of a model."""
    text = config.text_config
    return ModelFacts(
        max_position_embeddings=text.max_position_embeddings,
        is_quantized=is_quantized,
        num_hidden_layers=text.num_hidden_layers,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
    )
