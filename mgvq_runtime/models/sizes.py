"""How large a model will be, from its config.json alone (called by `inspect`).

The graph is made on the meta device, so no size takes memory. Counts what the quantizer would write
at its default rates; that small models share codebooks is left out, so a little too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mgvq_kernels.layout import VQLayout
from mgvq_runtime.checkpoint.bits import BitCount, count_bits, group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.registry import find_family, meta_graph

DEFAULT_RATES = {"vision": 4, "projector": 4, "embedding": 4}
"""Bits a weight of the groups that are not given the decoder's rate."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model."""

    config: ModelConfig
    parameters: int
    unquantized_parameters: int
    """Norms, biases and the few matrices of no fitting width; two bytes each."""
    groups: Mapping[str, BitCount]
    """Bits of the quantized matrices by group, and the "total"."""

    @property
    def dense_bytes(self) -> int:
        """Bytes in a 16-bit type."""
        return 2 * self.parameters

    @property
    def mgvq_bytes(self) -> int:
        """Bytes of a checkpoint: codes, codebooks, scales, permutations and the rest."""
        return self.groups["total"].bits // 8 + 2 * self.unquantized_parameters

    @property
    def kv_token_bytes(self) -> int:
        """Bytes a token of context takes in a 16-bit cache."""
        text = self.config.text_config
        return 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def measure(config: Mapping[str, Any], bits: int = 2) -> ModelSize:
    """Count a model's parameters and what a quantized checkpoint of it takes.

    Args:
        config: A parsed config.json.
        bits: Bits a weight of the decoder's matrices: 1, 2, 3 or 4.

    Raises:
        ConfigError: if the architecture is not known or asks for what is not implemented.
    """
    family = find_family(config)
    shapes = family.config.from_hf(config)
    model = meta_graph(family, shapes)
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0:
            rows, columns = module.weight.shape
            rate = DEFAULT_RATES.get(group_of(name), bits)
            layout = VQLayout.uniform(rows, columns, rate, has_permutation=True)
            matrices[name] = MatrixSpec(layout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = count_bits(matrices)
    return ModelSize(shapes, parameters, parameters - groups["total"].weights, groups)
