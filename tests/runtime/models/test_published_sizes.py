"""Every published size can be made on the meta device, and has the parameters it is known for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mgvq_runtime.inspect import main
from mgvq_runtime.models.registry import find_family
from mgvq_runtime.models.sizes import measure
from tests.runtime.models.families import llava_config
from tests.runtime.models.published import PARAMETERS, PUBLISHED


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters(name: str) -> None:
    size = measure(PUBLISHED[name])
    assert size.parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=1e-3)
    assert 0.1 < size.mgvq_bytes / size.dense_bytes < 0.22
    assert 2 < size.groups["decoder"].bits_per_weight < 2.2


def test_both_publishers_of_one_model_agree() -> None:
    """They differ by the rows of a padded vocabulary alone."""
    hf = measure(PUBLISHED["LLaVA-OneVision-0.5B"])
    lmms = measure(PUBLISHED["LLaVA-OneVision-0.5B (lmms-lab)"])
    assert hf.parameters - lmms.parameters == (152000 - 151936) * 896
    assert hf.config.vision_config == lmms.config.vision_config


def test_counts_are_those_of_the_modules() -> None:
    """By hand, on a tiny model: what is a matrix, and what is left of it."""
    config = llava_config()
    size = measure(config, bits=3)
    with torch.device("meta"):
        family = find_family(config)
        model = family.model(family.config.from_hf(config))
    matrices = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0
    ]
    total = size.groups["total"]
    assert total.weights == sum(matrices)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    decoder = size.groups["decoder"]
    assert decoder.codes == 3 * decoder.weights
    assert size.mgvq_bytes == total.bits // 8 + 2 * (size.parameters - total.weights)
    assert size.kv_token_bytes == 2 * 2 * 2 * 2 * 16  # k and v, bytes, layers, heads, width


def test_inspect_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["InternVL2-2B"]))
    assert main([str(path), "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    size = measure(PUBLISHED["InternVL2-2B"])
    assert report["parameters"] == size.parameters
    assert report["memory_bytes"] == size.mgvq_bytes + 8192 * 2 * 2 * 24 * 8 * 128
    for words in ("InternVLChatModel", "decoder", "projector", "MGVQ at 2 bits", "8,192 tokens"):
        assert words in out


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["Unheard"]}', None])
def test_a_config_that_says_nothing(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mgvq-inspect: ")
