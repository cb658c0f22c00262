"""What memory is needed for: estimated from shapes, or measured on a GPU (called by `startup`).

The estimate comes before anything is loaded; on a GPU the largest pictures are then encoded and the
longest chunk is read for real. Who gets how much of it is `memory_plan`'s decision.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mgvq_runtime.checkpoint.bits import TOTAL, count_bits
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.memory_plan import MemoryDemand
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.activations import decoder_activation_bytes, vision_activation_bytes
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.multimodal.processors import ImageProcessor


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device; on an integrated GPU that is also the CPU's."""
    if device.type != "cuda":
        return _available_main_memory()
    free = int(torch.cuda.mem_get_info(device)[0])
    if torch.cuda.get_device_properties(device).is_integrated:
        return min(free, _available_main_memory())
    return free


def checkpoint_bytes(checkpoint: Checkpoint, element_bytes: int) -> int:
    """Return what a checkpoint's weights take once loaded, dense ones `element_bytes` a number."""
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    num_dense = sum(math.prod(tensor.shape) for tensor in checkpoint.dense.values())
    return count_bits(matrices)[TOTAL].bits // 8 + num_dense * element_bytes


def worst_patches(config: EngineConfig, max_grid: tuple[int, int, int]) -> int:
    """Return the most patches in the vision tower at once: as many tiles as fit, one at least.

    A picture that is not cut is one tile; the frames of a video are no larger than it.
    """
    tile = max_grid[1] * max_grid[2]
    return max(1, config.max_batch_patches // tile) * tile


def estimated_demand(
    config: EngineConfig,
    shapes: ModelConfig,
    images: ImageProcessor | None,
    max_model_len: int,
    element_bytes: int,
    available: int,
    weights: int,
) -> MemoryDemand:
    """Estimate from shapes alone.

    Args:
        config: What the user said.
        shapes: The model's.
        images: Says how large the largest picture is; None for text alone.
        max_model_len: Longest context.
        element_bytes: Bytes of an activation.
        available: Bytes that are there.
        weights: Bytes of the weights.
    """
    chunk = min(config.max_batch_tokens, max_model_len)
    prefill = decoder_activation_bytes(
        shapes.text_config, chunk, max_model_len, config.max_logits_rows, element_bytes
    )
    if images is None or shapes.vision_config is None:
        return MemoryDemand(available, weights, 0, prefill, 0, is_measured=False)
    at_once = worst_patches(config, images.max_grid)
    num_patches = max(at_once, math.prod(images.max_grid))
    vision = vision_activation_bytes(shapes.vision_config, num_patches, at_once, element_bytes)
    return MemoryDemand(
        available, weights, vision, prefill, images.max_num_tokens, is_measured=False
    )


def measured_demand(
    model: CausalLM,
    images: ImageProcessor | None,
    config: EngineConfig,
    max_model_len: int,
    device: torch.device,
    available: int,
) -> MemoryDemand:
    """Run the worst cases on a GPU and read what they took.

    Args:
        model: Loaded.
        images: As in `estimated_demand`.
        config: What the user said.
        max_model_len: Longest context.
        device: A CUDA device.
        available: What was free before the model was loaded.
    """
    vision = 0
    if images is not None:
        vision = _peak_bytes(device, lambda: encode_largest_pictures(model, images, config))
    prefill = _peak_bytes(device, lambda: read_longest_chunk(model, config, max_model_len))
    torch.cuda.empty_cache()
    # What is gone now: weights, and what libraries took for themselves while they ran.
    weights = available - available_bytes(device)
    num_tokens = 0 if images is None else images.max_num_tokens
    return MemoryDemand(available, weights, vision, prefill, num_tokens, is_measured=True)


@torch.inference_mode()
def encode_largest_pictures(model: CausalLM, images: ImageProcessor, config: EngineConfig) -> None:
    """Encode the largest picture, in as many tiles as one step may encode if it has fewer."""
    vision = model.config.vision_config
    assert vision is not None, "only a model with a vision tower has an image processor"
    at_once = worst_patches(config, images.max_grid)
    t, h, w = images.max_grid
    t = max(t, at_once // (h * w))
    device = next(model.parameters()).device
    patches = torch.zeros(t * h * w, vision.patch_dim, dtype=torch.float32, device=device)
    model.encode_images(patches, [(t, h, w)], max_patches=at_once)


@torch.inference_mode()
def read_longest_chunk(model: CausalLM, config: EngineConfig, max_model_len: int) -> None:
    """Read a chunk that ends the longest context, through a cache that all layers share."""
    text, size = model.config.text_config, config.block_size
    device = next(model.parameters()).device
    T = min(config.max_batch_tokens, max_model_len)
    num_blocks = -(-max_model_len // size)
    shape = (num_blocks, size, text.num_key_value_heads, text.head_dim)
    pool = (torch.zeros(shape, dtype=model.dtype, device=device),) * 2
    places = torch.arange(max_model_len - T, max_model_len, device=device)  # [T]
    batch = ForwardBatch(
        positions=places.expand(3, T),
        cu_seqlens_q=(0, T),
        context_lens=(max_model_len,),
        block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=places,
        kv_cache=(pool,) * text.num_hidden_layers,
    )
    hidden = model(model.embed(torch.zeros_like(places)), batch)  # [T, D]
    model.logits(hidden[: config.max_logits_rows])


def _peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Return the most bytes alive during a run, less those alive before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _available_main_memory() -> int:
    """Return what Linux says is available, elsewhere all there is; no limit where nobody says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sys.maxsize
