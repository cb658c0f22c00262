"""From a folder to a checkpoint: what is written, resuming, refusals, the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgvq_kernels import ops
from mgvq_quantizer import cli, stream
from mgvq_quantizer.calibration import CalibrationError
from mgvq_quantizer.codebook import Codebook
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.layers.linear import VQLinear
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK, llava_row, picture, write_calibration

RECIPE = QuantRecipe(**QUICK)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but what tells the time of the run."""
    skipped = {"quantization_report.json", "quantization_report.html", "manifest.json"}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in skipped}


def test_the_checkpoint_loads_and_decodes_to_what_is_on_disk(
    quantized: tuple[Path, Report],
) -> None:
    folder, _ = quantized
    checkpoint = open_checkpoint(folder)
    model = load_model(folder)
    seen = 0
    for name, weight in checkpoint.vq_weights():
        module = model.get_submodule(name)
        table = weight.codebooks[0][0].float() * weight.codebook_scales[0][0]
        values = table[weight.codes[0][0].long()].flatten(1) * weight.scales.float()[:, None]
        assert weight.permutation is not None
        matrix = torch.empty_like(values)
        matrix[:, weight.permutation.long()] = values
        assert torch.equal(ops.vq_dequantize(module.packed), matrix)  # type: ignore[arg-type]
        seen += isinstance(module, VQLinear)
    assert seen == 8 + 11
    dense = dict(checkpoint.tensors())
    assert {tensor.dtype for tensor in dense.values()} == {torch.float16}
    assert "model.layers.0.self_attn.qkv_proj.bias" in dense


def test_the_checkpoint_is_self_contained(dense: Path, quantized: tuple[Path, Report]) -> None:
    folder, report = quantized
    for name in ("tokenizer.json", "preprocessor_config.json", "questions.zip"):
        assert (folder / name).read_bytes() == (dense / name).read_bytes()
    assert not (folder / "calibration.zip").exists()
    assert not folder.with_name(folder.name + ".partial").exists()
    assert json.loads((folder / "quantization_report.json").read_text())["kl"] == report.kl
    settings = open_checkpoint(folder).quantization
    assert settings is not None
    assert settings.recipe["refit_rounds"] == QUICK["refit_rounds"]
    assert settings.calibration["conversations"] == 5


def test_reported_bits_are_those_counted_by_hand(quantized: tuple[Path, Report]) -> None:
    folder, report = quantized
    tensors = load_file(folder / "model.safetensors")
    bits = weights = 0
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and ".codes." in name:
            weights += tensor.numel() * 4
        is_decoder = name.startswith(("model.layers.", "codebooks.model-layers"))
        if is_decoder and not name.endswith((".bias", ".weight")):
            bits += 8 * tensor.numel() * tensor.element_size()
    assert report.groups["decoder"].bits_per_weight == pytest.approx(bits / weights, rel=1e-9)
    assert report.groups["decoder"].weights == weights
    table = report.table()
    assert f"{bits / weights:.3f}" in table
    assert "nats an answer token" in table


def test_rounding_with_feedback_beats_nearest_on_every_matrix(
    quantized: tuple[Path, Report],
) -> None:
    for name, matrix in quantized[1].matrices.items():
        assert matrix.error < matrix.error_nearest, name
    assert quantized[1].kl <= quantized[1].kl_rounded


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    trained: list[str] = []
    save, keep_books = WorkFolder.save, stream.keep_books

    def train(work: WorkFolder, label: str, books: Mapping[str, Codebook]) -> None:
        keep_books(work, label, books)
        trained.append(label)

    def stop_after(self: WorkFolder, name: str, solution: Solution) -> None:
        save(self, name, solution)
        saved.append(name)
        if len(saved) == 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "save", stop_after)
    monkeypatch.setattr(stream, "keep_books", train)
    output = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, output, RECIPE, show_progress=False)
    assert not output.exists()
    kept = {file.stem for file in (tmp_path / "checkpoint.partial").glob("*.safetensors")}
    assert kept == {*saved, *(f"tables of {label}" for label in trained)}
    quantize(dense, output, RECIPE, show_progress=False)
    assert len(saved) == len(set(saved)) == 20
    assert len(trained) == len(set(trained)) > 3
    assert contents(output) == contents(quantized[0])


def test_a_changed_setting_or_source_is_refused_by_name(dense: Path, tmp_path: Path) -> None:
    facts = {**RECIPE.to_json(), "source": "a"}
    with WorkFolder(tmp_path / "run", facts) as work:
        work.save_facts("a", {})
    with WorkFolder(tmp_path / "run", facts):
        pass
    with pytest.raises(ResumeError, match=r"bits = 2, this one has 3.*start over"):
        WorkFolder(tmp_path / "run", {**facts, "bits": 3})
    with pytest.raises(ResumeError, match="source = 'a', this one has 'b'"):
        WorkFolder(tmp_path / "run", {**facts, "source": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match="not an unfinished run"):
        WorkFolder(tmp_path / "other", facts)


def test_a_damaged_piece_of_work_is_named(quantized: tuple[Path, Report], tmp_path: Path) -> None:
    name, weight = next(iter(open_checkpoint(quantized[0]).vq_weights()))
    with WorkFolder(tmp_path / "run", {}) as work:
        assert work.load(name, weight.layout) is None
        work.save(name, Solution(weight, 0.25, 0.125))
        again = work.load(name, weight.layout)
        assert again is not None
        assert (again.error_nearest, again.error) == (0.25, 0.125)
        assert torch.equal(again.weight.codes[0][0], weight.codes[0][0])
        file = tmp_path / "run" / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ResumeError, match="is damaged"):
            work.load(name, weight.layout)


def test_existing_output_and_quantized_source_are_refused(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="exists: choose another"):
        quantize(dense, quantized[0], RECIPE, show_progress=False)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(quantized[0], tmp_path / "x", RECIPE, show_progress=False)


@pytest.mark.parametrize("part", ["visual.blocks.1.mlp.fc1", "model.layers.1.mlp.down_proj"])
def test_a_weight_that_is_not_finite_is_named(dense: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(dense, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{part}.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{part}.weight"):
        quantize(tmp_path / "source", tmp_path / "out", RECIPE, show_progress=False)


def test_text_alone_cannot_calibrate_a_vision_tower(dense: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Yes"}]
    path = write_calibration(tmp_path / "c.zip", [{"conversations": turns}] * 3, {})
    with pytest.raises(CalibrationError, match="holds no picture"):
        quantize(dense, tmp_path / "out", RECIPE, path, show_progress=False)
    one = write_calibration(tmp_path / "d.zip", [llava_row("a.png")], {"a.png": picture(0)})
    with pytest.raises(CalibrationError, match="at least 2"):
        quantize(dense, tmp_path / "out", RECIPE, one, show_progress=False)


def test_the_command_says_what_is_wrong_and_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--model", str(dense), "--output", str(tmp_path / "out")]
    assert cli.main([*paths, "--bits", "9"]) == 2
    assert "bits must lie between 1.0 and 8.0" in capsys.readouterr().err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "quantize", interrupt)
    assert cli.main(paths) == 130
    assert "out.partial; the same command goes on" in capsys.readouterr().err
