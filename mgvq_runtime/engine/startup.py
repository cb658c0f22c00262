"""From a folder to a loaded model with every setting settled (called by `Engine.from_checkpoint`).

Order: device and type, weights, then on a GPU a real worst case is run and measured, and the
key/value pool gets what is left. Nothing is served here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.config import (
    EngineConfig,
    ModelFacts,
    ResolvedConfig,
    resolve,
    resolve_device,
    resolve_dtype,
)
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors import ImageProcessor


def start(
    path: str | Path | None, config: EngineConfig
) -> tuple[CausalLM, ChatProcessor, ResolvedConfig]:
    """Load model and processors and resolve the settings.

    Args:
        path: Checkpoint folder; None takes the config's, then the bundled one.
        config: What the user said.

    Raises:
        CheckpointError: if the folder is missing, damaged or not ours.
        ConfigError: if the settings do not fit this model or this machine.
    """
    folder = Path(path or config.checkpoint or demo_checkpoint_path())
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device, torch.cuda.device_count())
    checkpoint = open_checkpoint(folder)
    is_quantized = checkpoint.quantization is not None
    dtype = resolve_dtype(config.dtype, device, is_quantized)
    model = fill_model(checkpoint, device, getattr(torch, dtype))
    processor = ChatProcessor.from_checkpoint(
        checkpoint, model.config, config.max_image_tokens, config.image_cache_bytes
    )
    free_bytes = None
    if device != "cpu":
        run_worst_case(model, processor.image_processor, config, torch.device(device))
        torch.cuda.synchronize(device)
        free_bytes = torch.cuda.mem_get_info(device)[0]
    facts = model_facts(model.config, is_quantized)
    resolved = resolve(config, facts, device, dtype, free_bytes)
    model.set_context_length(resolved.max_model_len)
    return model, processor, resolved


def model_facts(config: ModelConfig, is_quantized: bool) -> ModelFacts:
    """Return what `config.resolve` must know of a model."""
    text = config.text_config
    return ModelFacts(
        max_position_embeddings=text.max_position_embeddings,
        is_quantized=is_quantized,
        num_hidden_layers=text.num_hidden_layers,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
    )


@torch.inference_mode()
def run_worst_case(
    model: CausalLM,
    image_processor: ImageProcessor | None,
    config: EngineConfig,
    device: torch.device,
) -> None:
    """Encode the largest picture and run the longest chunk, without a cache.

    torch keeps the memory that this took, so what is free afterwards is free for good.
    """
    if image_processor is not None:
        vision = model.config.vision_config
        assert vision is not None, "only a model with a vision tower has an image processor"
        t, h, w = image_processor.max_grid
        patches = torch.zeros(t * h * w, vision.patch_dim, dtype=model.dtype, device=device)
        model.encode_images(patches, [(t, h, w)])
    T = config.max_batch_tokens
    positions = torch.arange(T, device=device).expand(3, T)  # [3, T]
    embeds = model.embed(torch.zeros(T, dtype=torch.int64, device=device))  # [T, D]
    hidden = model(embeds, ForwardBatch.of_sequence(positions))  # [T, D]
    model.logits(hidden[: config.max_num_seqs])
