"""What memory is needed for: estimated from shapes, or measured on a GPU (called by `startup`).

The estimate comes before anything is loaded; on a GPU the largest picture or video is then encoded,
the longest chunk read and decode steps recorded for real. Who gets how much of it is
`memory_plan`'s decision.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mgvq_runtime.cache.kv_cache import KVCache
from mgvq_runtime.checkpoint.bits import TOTAL, count_bits
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.checkpoint.row_parts import TABLE
from mgvq_runtime.config import EngineConfig, ModelFacts, resolve_kv_cache_dtype
from mgvq_runtime.engine.decode_graphs import CudaRecorder, DecodeGraphs
from mgvq_runtime.engine.memory_plan import MemoryDemand
from mgvq_runtime.errors import ConfigError
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.activations import (
    decode_graph_bytes,
    decoder_activation_bytes,
    vision_activation_bytes,
)
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.multimodal.processors import ImageProcessor


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


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device; on an integrated GPU that is also the CPU's."""
    if device.type != "cuda":
        return _available_main_memory()
    free = int(torch.cuda.mem_get_info(device)[0])
    return min(free, _available_main_memory()) if _shares_main_memory(device) else free


def checkpoint_bytes(checkpoint: Checkpoint, element_bytes: int) -> int:
    """Return what a checkpoint's weights take once loaded, dense ones `element_bytes` a number."""
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    num_dense = sum(math.prod(tensor.shape) for tensor in checkpoint.dense.values())
    return count_bits(matrices)[TOTAL].bits // 8 + num_dense * element_bytes


def movable_table_bytes(
    config: EngineConfig,
    checkpoint: Checkpoint,
    shapes: ModelConfig,
    device: torch.device,
    element_bytes: int,
) -> int:
    """Return the bytes of a token table that can lie in main memory instead of on a GPU.

    Returns:
        0 where it must stay or nothing is saved by it: the table is the output head too, it is
        quantized and small, or the device's memory is main memory.

    Raises:
        ConfigError: if the user wants it there nevertheless.
    """
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    if device.type != "cuda":
        reason = "without a GPU it is in main memory anyway"
    elif _shares_main_memory(device):
        reason = "this GPU shares main memory, so nothing is saved"
    elif shapes.tie_word_embeddings:
        reason = "this model's token table is its output head too, which the GPU reads whole"
    elif any(name.startswith(TABLE) for name in matrices):
        reason = "this model's token table is quantized, and decoded on the GPU"
    else:
        return shapes.text_config.vocab_size * shapes.text_config.hidden_size * element_bytes
    if config.embedding_device == "host":
        raise ConfigError(f"embedding_device='host' cannot be: {reason}; use 'auto'")
    return 0


def largest_grid(images: ImageProcessor, takes_videos: bool, context: int) -> tuple[int, int, int]:
    """Return the grid of the picture or video with most patches; a video fits the context."""
    video = images.max_video_grid(context) if takes_videos else None
    return max([images.max_grid, *([video] if video else [])], key=math.prod)


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
    decode_batch_sizes: Sequence[int] = (),
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
        decode_batch_sizes: Of the decode steps that are recorded.
    """
    text = shapes.text_config
    chunk = min(config.max_batch_tokens, max_model_len)
    prefill = decoder_activation_bytes(
        text, chunk, max_model_len, config.max_logits_rows, element_bytes
    )
    graphs = vision = 0
    if decode_batch_sizes:
        most, size = decode_batch_sizes[-1], config.block_size
        graphs = decode_graph_bytes(text, most, size, max_model_len, element_bytes)
    if images is not None and shapes.vision_config is not None:
        at_once = worst_patches(config, images.max_grid)
        largest = largest_grid(images, shapes.video_token_id is not None, max_model_len)
        num_patches = max(at_once, math.prod(largest))
        vision = vision_activation_bytes(shapes.vision_config, num_patches, at_once, element_bytes)
    return MemoryDemand(
        available,
        weights,
        vision,
        prefill,
        0 if images is None else images.max_num_tokens,
        is_measured=False,
        rows_bytes=_rows_bytes(config, shapes, images, max_model_len, element_bytes),
        graphs_bytes=graphs,
    )


def measured_demand(
    model: CausalLM,
    images: ImageProcessor | None,
    config: EngineConfig,
    max_model_len: int,
    available: int,
    decode_batch_sizes: Sequence[int],
    host_bytes: int,
) -> MemoryDemand:
    """Run the worst cases on a GPU and read what they took.

    Args:
        model: Loaded on a CUDA device.
        images: As in `estimated_demand`.
        config: What the user said.
        max_model_len: Longest context.
        available: What was free before the model was loaded.
        decode_batch_sizes: As in `estimated_demand`.
        host_bytes: The token table if it lies in main memory; it is counted with the weights.
    """
    device, vision = model.device, 0
    if images is not None:
        encode = partial(encode_largest_pictures, model, images, config, max_model_len)
        vision = _peak_bytes(device, encode)
    prefill = _peak_bytes(device, lambda: read_longest_chunk(model, config, max_model_len))
    graphs = 0
    if decode_batch_sizes:
        graphs = _graph_bytes(model, config, max_model_len, decode_batch_sizes)
    torch.cuda.empty_cache()
    # What is gone now: weights, and what libraries took for themselves while they ran.
    weights = available - available_bytes(device) + host_bytes
    width = model.dtype.itemsize
    return MemoryDemand(
        available,
        weights,
        vision,
        prefill,
        0 if images is None else images.max_num_tokens,
        is_measured=True,
        rows_bytes=_rows_bytes(config, model.config, images, max_model_len, width),
        graphs_bytes=graphs,
    )


@torch.inference_mode()
def encode_largest_pictures(
    model: CausalLM, images: ImageProcessor, config: EngineConfig, max_model_len: int
) -> None:
    """Encode the largest picture or video, or as many tiles as one step may if that is more."""
    vision = model.config.vision_config
    assert vision is not None, "only a model with a vision tower has an image processor"
    at_once = worst_patches(config, images.max_grid)
    takes_videos = model.config.video_token_id is not None
    t, h, w = largest_grid(images, takes_videos, max_model_len)
    t = max(t, at_once // (h * w))
    patches = torch.zeros(t * h * w, vision.patch_dim, dtype=torch.float32, device=model.device)
    model.encode_images(patches, [(t, h, w)], max_patches=at_once)


@torch.inference_mode()
def read_longest_chunk(model: CausalLM, config: EngineConfig, max_model_len: int) -> None:
    """Read a chunk that ends the longest context, through a cache that all layers share."""
    size, device = config.block_size, model.device
    T = min(config.max_batch_tokens, max_model_len)
    num_blocks = -(-max_model_len // size)
    places = torch.arange(max_model_len - T, max_model_len, device=device)  # [T]
    batch = ForwardBatch(
        positions=places.expand(3, T),
        cu_seqlens_q=(0, T),
        context_lens=(max_model_len,),
        block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=places,
        kv_cache=_one_layer_for_all(model, config, num_blocks),
    )
    ids = torch.zeros(T, dtype=torch.int64, device=model.ids_device)
    hidden = model(model.embed(ids), batch)  # [T, D]
    model.logits(hidden[: config.max_logits_rows])


def _one_layer_for_all(
    model: CausalLM, config: EngineConfig, num_blocks: int
) -> tuple[LayerCache, ...]:
    """Return a cache whose layers are one and the same memory."""
    one_layer = replace(model_facts(model.config, is_quantized=False), num_hidden_layers=1)
    dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, str(model.dtype).removeprefix("torch."))
    kinds = (model.device, getattr(torch, dtype))
    cache = KVCache(one_layer, num_blocks, config.block_size, *kinds)
    return cache.layers * model.config.text_config.num_hidden_layers


def _graph_bytes(
    model: CausalLM, config: EngineConfig, max_model_len: int, batch_sizes: Sequence[int]
) -> int:
    """Record decode steps over a pool of one block, and return what comes free without them."""
    device, cache = model.device, _one_layer_for_all(model, config, 1)
    graphs = DecodeGraphs(model, cache, batch_sizes, max_model_len, CudaRecorder(device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = available_bytes(device)
    del graphs
    torch.cuda.empty_cache()
    return max(0, available_bytes(device) - before)


def _rows_bytes(
    config: EngineConfig,
    shapes: ModelConfig,
    images: ImageProcessor | None,
    context: int,
    element_bytes: int,
) -> int:
    """Return what encoded pictures take while their prompt is read, beside those kept for reuse.

    At the worst the rows of the largest one, cut off in the chunk before, and those of a chunk:
    held by their requests, and once more laid end to end.
    """
    if images is None:
        return 0
    takes_videos = shapes.video_token_id is not None
    has_long_videos = takes_videos and images.max_video_grid(context) is not None
    largest = max(images.max_num_tokens, context if has_long_videos else 0)
    num_rows = largest + min(config.max_batch_tokens, context)
    return 2 * num_rows * shapes.text_config.hidden_size * element_bytes


def _shares_main_memory(device: torch.device) -> bool:
    """Return whether a GPU is integrated, like a Jetson's; one that is not there is not."""
    if device.index is None or device.index >= torch.cuda.device_count():
        return False
    return bool(torch.cuda.get_device_properties(device).is_integrated)


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
