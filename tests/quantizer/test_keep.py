"""Matrices that stay unquantized: chosen by pattern, stored as they were, counted, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgvq_quantizer import pipeline
from mgvq_quantizer.allocation import matrix_shapes
from mgvq_quantizer.evaluate import evaluate, to_dense
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import KEPT, WITH_KEPT, Report
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ConfigError
from mgvq_runtime.layers.vq_matrix import VQMatrix
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK

KEEP = "visual.*, model.embed_tokens, *.1.*.down_proj"


@pytest.fixture(scope="module")
def partly(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("partly") / "checkpoint"
    return output, quantize(dense, output, QuantRecipe(**QUICK, keep=KEEP), show_progress=False)


def test_what_is_kept_is_stored_as_it_was_and_the_rest_is_quantized(
    dense: Path, partly: tuple[Path, Report], quantized: tuple[Path, Report]
) -> None:
    source, model = load_model(dense), load_model(partly[0])
    changed = {name for name, m in model.named_modules() if isinstance(m, VQMatrix)}
    everything = set(matrix_shapes(source))
    kept = {n for n in everything if not n.startswith("model.layers.")}
    kept.add("model.layers.1.mlp.down_proj")
    assert changed == everything - kept
    assert "model.layers.0.mlp.down_proj" in changed
    for name in kept:
        assert torch.equal(
            model.get_submodule(name).weight, source.get_submodule(name).weight.half().float()
        ), name
    ids = torch.arange(5, 12)
    again = to_dense(load_model(partly[0]))
    assert torch.allclose(model.model.embed_tokens(ids), again.model.embed_tokens(ids))
    marks = evaluate(partly[0], dense, show_progress=False)
    everything_quantized = evaluate(quantized[0], dense, show_progress=False)
    # .117 and .129, each +- .01: ten questions to a random model, and processors round differently.
    assert 0.0 < marks.kl < 1.25 * everything_quantized.kl


def test_the_report_counts_what_is_kept(partly: tuple[Path, Report]) -> None:
    folder, report = partly
    model = load_model(folder)
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    )
    total, kept, both = (report.groups[name] for name in ("total", KEPT, WITH_KEPT))
    assert (kept.weights, kept.bits_per_weight) == (weights, 16)
    assert both.weights == total.weights + weights
    bits = total.weights * total.bits_per_weight + 16 * weights
    assert both.bits_per_weight == pytest.approx(bits / both.weights, rel=1e-12)
    assert report.table().count("kept") == 2
    assert json.loads((folder / "quantization_report.json").read_text())["groups"][KEPT]
    assert "kept dense" in (folder / "quantization_report.html").read_text()
    settings = open_checkpoint(folder).quantization
    assert settings is not None
    assert settings.recipe["keep"] == KEEP
    assert set(settings.bits_per_weight) == {"target", "decoder", "total"}


def test_bands_are_planned_for_the_rest(dense: Path, tmp_path: Path) -> None:
    """A decoder that is kept whole leaves nothing to survey."""
    recipe = QuantRecipe(**{**QUICK, "allocation": "model", "tuning_steps": 0}, keep="model.*")
    report = quantize(dense, tmp_path / "checkpoint", recipe, show_progress=False)
    assert set(report.groups) >= {"vision", KEPT}
    assert "decoder" not in report.groups


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ("visual.*,*.q_proj", r"'\*.q_proj', which is no matrix .* model.layers.\*.mlp.down_proj"),
        ("*", r"keep = '\*' leaves no matrix to quantize"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_before_the_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, problem: str
) -> None:
    monkeypatch.setattr(pipeline, "read_data", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ConfigError, match=problem):
        quantize(dense, tmp_path / "x", QuantRecipe(**QUICK, keep=keep))
