"""How much memory an engine takes (called by `engine.Engine` and the benchmarks)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mgvq_kernels.layout import PackedVQ
from mgvq_runtime.models.causal_lm import CausalLM


@dataclass(frozen=True)
class MemorySummary:
    """Bytes an engine holds on its device, and the most its process has held."""

    weights_bytes: int
    """Parameters and packed quantized weights."""
    decode_bytes: int
    """The part of the weights that every generated token reads: decoder and output head."""
    kv_cache_bytes: int
    """The key/value pool, allocated once."""
    peak_rss_bytes: int
    """Most main memory of this process so far, everything included."""
    peak_device_bytes: int | None
    """Most GPU memory torch has held; None on a CPU."""


def peak_rss_bytes() -> int:
    """Return the most main memory this process has held, or 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Return the most memory torch has held on a GPU, None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def weights_bytes(*modules: nn.Module, device_type: str | None = None) -> int:
    """Return the bytes of all parameters, buffers and packed weights; shared ones count once.

    Args:
        modules: Loaded.
        device_type: "cuda" leaves out what lies in main memory; None counts everything.
    """
    storages: dict[int, int] = {}
    for module in modules:
        for tensor in _tensors(module):
            if device_type in (None, tensor.device.type):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def decode_bytes(model: CausalLM) -> int:
    """Return the bytes of decoder and head; an untied token table is left out, it is looked up."""
    tables = [] if model.config.tie_word_embeddings else [model.model.embed_tokens]
    return weights_bytes(model.model, model.lm_head) - weights_bytes(*tables)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, PackedVQ):
            yield from packed.tensors.values()
