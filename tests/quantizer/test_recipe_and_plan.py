"""Settings, the command line made from them, and what is planned for each matrix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from mgvq_quantizer import cli, evaluate_cli
from mgvq_quantizer.allocation import kind_of, plan, sharing_groups
from mgvq_quantizer.cli import build_parser, recipe_from_arguments
from mgvq_quantizer.recipe import (
    PRESETS,
    ROUNDING_ONLY,
    TUNING_ONLY,
    QuantRecipe,
    make_recipe,
)
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
    plans = plan(decoder(256, 768, 5), QuantRecipe(bits=bits, allocation="uniform"))
    counts = count_bits({name: matrix.spec for name, matrix in plans.items()})
    assert bits < counts["decoder"].bits_per_weight <= limit
    assert 4 < counts["embedding"].bits_per_weight <= 4.2


def test_small_matrices_share_tables_with_their_kind() -> None:
    plans = plan(decoder(64, 128, 3), QuantRecipe(bits=2, allocation="uniform"))
    groups = sharing_groups(plans)
    assert all(matrix.shared for name, matrix in plans.items() if "layers" in name)
    assert not plans["model.embed_tokens"].shared
    assert {len(group) for group in groups.values()} == {3}
    own = plan(decoder(64, 128, 3), QuantRecipe(max_codebook_overhead=100.0))
    assert not sharing_groups(own)
    assert kind_of("model.layers.12.mlp.down_proj") == "model-layers-mlp-down_proj"


def test_every_setting_is_a_flag_with_the_field_as_default_and_help() -> None:
    parser = build_parser()
    assert recipe_from_arguments(parser.parse_args(PATHS)) == QuantRecipe()
    text = parser.format_help()
    for field in dataclasses.fields(QuantRecipe):
        assert "--" + field.name.replace("_", "-") in text
    flags = ["--bits", "3", "--allocation", "uniform", "--no-permute", "--codebook-lr", "0.5"]
    expected = QuantRecipe(bits=3, allocation="uniform", permute=False, codebook_lr=0.5)
    assert recipe_from_arguments(parser.parse_args([*PATHS, *flags])) == expected
    parsed = parser.parse_args([*PATHS, "--max-image-tokens", "600"])
    assert recipe_from_arguments(parsed) == QuantRecipe(max_image_tokens=600)
    with pytest.raises(SystemExit):
        parser.parse_args([*PATHS, "--bit", "3"])


def test_flags_change_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('bits = 3\nallocation = "layer"\nrefit_rounds = 5\ndraw_out = 1\n')
    flags = ["--preset", "fast", "--recipe", str(file), "--refit-rounds", "7"]
    recipe = recipe_from_arguments(build_parser().parse_args([*PATHS, *flags]))
    fast = {**PRESETS["fast"], "bits": 3.0, "allocation": "layer", "refit_rounds": 7}
    assert recipe == QuantRecipe(**fast, draw_out=1.0)
    assert isinstance(recipe.draw_out, float)
    for text, problem in {
        "bit = 2": "'bit' is no setting; settings are bits, allocation",
        "seed = 'x'": "seed must be int, got 'x'",
        "bits = true": "bits must be float, got True",
        "bits": "cannot be read",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            make_recipe("default", file, {})
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        make_recipe("default", tmp_path / "none.toml", {})


def test_a_trellis_takes_one_round_whatever_the_preset_unless_it_is_told() -> None:
    kept = {name: make_recipe(name, None, {}) for name in PRESETS}
    assert [kept[name].rounds for name in ("fast", "default", "best")] == [2, 4, 6]
    for name in PRESETS:
        recipe = make_recipe(name, None, {"codec": "trellis"})
        assert recipe.rounds == 1
        assert recipe.tuning_steps == kept[name].tuning_steps
    told = make_recipe("best", None, {"codec": "trellis", "refit_rounds": 3})
    written = [r.to_json() for r in (QuantRecipe(), QuantRecipe(codec="trellis"), told)]
    assert [made["refit_rounds"] for made in written] == [4, 1, 3]


def test_codes_are_drawn_out_half_way_unless_they_are_told_or_descend() -> None:
    for settings, taken in (
        ({}, 0.5),
        ({"draw_out": 0.0}, 0.0),
        ({"draw_out": 1.0}, 1.0),
        ({"descent_sweeps": 2}, 0.0),
        ({"draw_out": 0.0, "descent_sweeps": 2}, 0.0),
        ({"codec": "trellis"}, 0.5),
        ({"codec": "trellis", "descent_sweeps": 1}, 0.0),
        ({"codec": "trellis", "draw_out": 0.25}, 0.25),
    ):
        recipe = make_recipe("default", None, settings)
        assert recipe.drawn_out == recipe.to_json()["draw_out"] == taken


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--bits", "0.9"], "bits must lie between 1.0 and 8.0, got 0.9"),
        (["--bits", "2.5", "--allocation", "uniform"], "bits must be one of 1, 2, 3, 4, 8"),
        (["--vision-bits", "5"], "vision_bits must be one of 1, 2, 3, 4, 8, got 5"),
        (["--allocation", "best"], "allocation must be one of model, layer, uniform"),
        (["--no-permute"], "bands of several rates need permute"),
        (
            ["--no-permute", "--channel-classes", "--allocation", "uniform", "--bits", "2"],
            "so do channel_classes: choose allocation uniform without them",
        ),
        (["--class-threshold", "-1"], "class_threshold must be at least 0, got -1.0"),
        (["--global-share", "1.5"], "global_share must lie in 0..1"),
        (["--mismatch", "1.5"], "mismatch must lie in 0..1, got 1.5"),
        (["--draw-out", "1.5"], "draw_out must lie in 0..1, got 1.5"),
        (["--draw-out", "0.5", "--descent-sweeps", "1"], "one of them must be 0, got 1 and 0.5"),
        (["--output-shrink", "0"], "output_shrink must lie between 0 and 1, got 0.0"),
        (["--shift-threshold", "-1"], "shift_threshold must be at least 0, got -1.0"),
        (["--shift-threshold", "nan"], "shift_threshold must be a finite number, got nan"),
        (["--max-codebook-overhead", "inf"], "max_codebook_overhead must be a finite number"),
        (["--max-codebook-overhead", "-1"], "max_codebook_overhead must be at least 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--window", "8"], "window does nothing unless codec is trellis: leave it out"),
        (
            ["--survey-bits", "4", "--allocation", "uniform", "--bits", "2"],
            "survey_bits does nothing unless allocation is model or layer",
        ),
        (["--class-threshold", "3"], "class_threshold does nothing unless channel_classes is True"),
        (["--shift-radius", "0.25"], "shift_radius does nothing unless gradient_shift is True"),
        (["--shift-radius", "-1"], "shift_radius must be at least 0, got -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(flags: list[str], problem: str) -> None:
    parsed = build_parser().parse_args([*PATHS, *flags])
    with pytest.raises(ConfigError, match=problem):
        recipe_from_arguments(parsed)


@pytest.mark.parametrize(
    ("bits", "rates", "reference"),
    [
        (1.0, (1, 2), 1),
        (2.0, (1, 2, 3, 4), 2),
        (2.25, (1, 2, 3, 4), 2),
        (3.0, (2, 3, 4), 3),
        (4.0, (2, 3, 4, 8), 4),
        (8.0, (4, 8), 8),
    ],
)
def test_bands_get_rates_around_the_target(
    bits: float, rates: tuple[int, ...], reference: int
) -> None:
    recipe = QuantRecipe(bits=bits)
    assert recipe.rates == rates
    assert recipe.reference_rate == reference


def test_settings_of_later_stages_are_settings() -> None:
    assert {*TUNING_ONLY, *ROUNDING_ONLY} <= {f.name for f in dataclasses.fields(QuantRecipe)}
    assert "keep" not in ROUNDING_ONLY, "a survey measures what is not kept"


@pytest.mark.parametrize("flag", ["--num-threads", "--max-samples"])
def test_counts_are_at_least_one(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = (
        (evaluate_cli.main, ["compare", "--model", "m", "--output", "o"]),
        (cli.main, PATHS),
        (evaluate_cli.main, ["--checkpoint", "c", "--reference", "r"]),
    )
    for main, words in commands[: 1 if flag == "--max-samples" else 3]:
        with pytest.raises(SystemExit):
            main([*words, flag, "0"])
        assert f"{flag}: expected a whole number of at least 1, got 0" in capsys.readouterr().err


def test_values_out_of_range_name_their_field() -> None:
    with pytest.raises(ConfigError, match="damping must lie between"):
        QuantRecipe(damping=0.0)
    with pytest.raises(ConfigError, match="refit_rounds must be at least 1"):
        QuantRecipe(refit_rounds=0)
