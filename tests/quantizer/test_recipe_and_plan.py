"""Settings, the command line made from them, and what is planned for each matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mgvq_quantizer.allocation import kind_of, plan, sharing_groups
from mgvq_quantizer.cli import build_parser, recipe_from_arguments
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.bits import count_bits
from mgvq_runtime.errors import ConfigError

PATHS = ["--model", "a", "--output", "b"]


class Block(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {
                "qkv_proj": nn.Linear(hidden, 2 * hidden),
                "o_proj": nn.Linear(hidden, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_up_proj": nn.Linear(hidden, 2 * wide, bias=False),
                "down_proj": nn.Linear(wide, hidden, bias=False),
            }
        )


def decoder(hidden: int, wide: int, layers: int) -> nn.Module:
    """A bag of matrices with the names and shapes of a decoder."""
    with torch.device("meta"):
        inner = nn.Module()
        inner.embed_tokens = nn.Embedding(2048, hidden)
        inner.layers = nn.ModuleList(Block(hidden, wide) for _ in range(layers))
        model = nn.Module()
        model.model = inner
    return model


@pytest.mark.parametrize(("bits", "limit"), [(1, 1.35), (2, 2.3), (3, 3.5), (4, 4.2)])
def test_the_demonstration_shapes_stay_near_their_rate_in_full(bits: int, limit: float) -> None:
    plans = plan(decoder(256, 768, 5), QuantRecipe(bits=bits))
    counts = count_bits({name: matrix.spec for name, matrix in plans.items()})
    assert bits < counts["decoder"].bits_per_weight <= limit
    assert 4 < counts["embedding"].bits_per_weight <= 4.2


def test_small_matrices_share_tables_with_their_kind() -> None:
    plans = plan(decoder(64, 128, 3), QuantRecipe(bits=2))
    groups = sharing_groups(plans)
    assert all(matrix.shared for name, matrix in plans.items() if "layers" in name)
    assert plans["model.embed_tokens"].shared is None
    assert {len(group) for group in groups.values()} == {3}
    own = plan(decoder(64, 128, 3), QuantRecipe(bits=2, max_codebook_overhead=100.0))
    assert not sharing_groups(own)
    assert kind_of("model.layers.12.mlp.down_proj") == "model-layers-mlp-down_proj"


def test_every_setting_is_a_flag_with_the_field_as_default_and_help() -> None:
    parser = build_parser()
    assert recipe_from_arguments(parser.parse_args(PATHS)) == QuantRecipe()
    text = parser.format_help()
    for field in dataclasses.fields(QuantRecipe):
        assert "--" + field.name.replace("_", "-") in text
    parsed = parser.parse_args([*PATHS, "--bits", "3", "--no-permute", "--codebook-lr", "0.5"])
    assert recipe_from_arguments(parsed) == QuantRecipe(bits=3, permute=False, codebook_lr=0.5)
    parsed = parser.parse_args([*PATHS, "--max-image-tokens", "600"])
    assert recipe_from_arguments(parsed) == QuantRecipe(max_image_tokens=600)
    with pytest.raises(SystemExit):
        parser.parse_args([*PATHS, "--bit", "3"])


@pytest.mark.parametrize("bits", ["2.5", "0", "5", "8"])
def test_other_rates_are_refused_by_name(bits: str) -> None:
    parsed = build_parser().parse_args([*PATHS, "--bits", bits])
    with pytest.raises(ConfigError, match="mixed and fractional rates come in a later release"):
        recipe_from_arguments(parsed)


def test_values_out_of_range_name_their_field() -> None:
    with pytest.raises(ConfigError, match="damping must lie between"):
        QuantRecipe(damping=0.0)
    with pytest.raises(ConfigError, match="refit_rounds must be at least 1"):
        QuantRecipe(refit_rounds=0)
