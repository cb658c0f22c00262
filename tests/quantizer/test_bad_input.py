"""What cannot be used is refused before it costs anything, by name and with what to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgvq_quantizer import cli, ldl, pipeline, preflight
from mgvq_quantizer.archive import Archive, DataError, read_rows
from mgvq_quantizer.batches import encode_pictures, length_batches, unique_pictures
from mgvq_quantizer.calibration import CalibrationError, load_conversations
from mgvq_quantizer.dataset import Data, read_data
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.preflight import check_room, check_weights, expected_bytes
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.residence import Residence
from mgvq_quantizer.teacher import ask_teacher
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK, SMALL, llava_row, picture, write_calibration

RECIPE = QuantRecipe(**SMALL)
Usage = namedtuple("Usage", "total used free")


def changed(small: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of a folder with one number of one tensor replaced."""
    shutil.copytree(small, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["visual.blocks.0.norm1.bias", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_end_the_command(
    name: str, value: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed(small, tmp_path / "source", name, float(value))
    paths = ["--model", str(source), "--output", str(tmp_path / "out")]
    assert cli.main([*paths, "--device", "cpu"]) == 2
    assert f"{name} has values that are not finite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("by_block", [False, True])
def test_what_float16_cannot_hold_is_refused_at_the_start(
    small: Path, tmp_path: Path, by_block: bool
) -> None:
    def load(folder: Path) -> CausalLM:
        return Residence(open_checkpoint(folder), "cpu", by_block).model

    norm = "model.layers.0.input_layernorm.weight"
    graph = load(changed(small, tmp_path / "a", norm, 1e30))
    with pytest.raises(CheckpointError, match=rf"ends at 65504.*\n.*{norm}: .* is 1e\+30"):
        check_weights(graph, RECIPE)
    matrix = "model.layers.0.mlp.down_proj.weight"
    graph = load(changed(small, tmp_path / "b", matrix, 1e5))
    check_weights(graph, RECIPE)  # its row scale is 1e5 / sqrt(128)
    graph = load(changed(small, tmp_path / "c", matrix, 1e6))
    with pytest.raises(CheckpointError, match=rf"{matrix}: the root mean square of a row is 88388"):
        check_weights(graph, RECIPE)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"bits": 1.0, "allocation": "model"}, r"bits is 1\.0.*give more bits"),
        ({"embedding_bits": 1.001}, "embedding_bits"),
    ],
)
def test_bits_that_pay_for_nothing_are_refused_before_anything_is_asked(
    settings: dict[str, Any],
    problem: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the dense model was asked first")

    monkeypatch.setattr(pipeline, "ask_teacher", fail)
    recipe = QuantRecipe(**{**QUICK, "max_codebook_overhead": 0.0, **settings})
    with pytest.raises(ConfigError, match=problem):
        quantize(dense, tmp_path / "out", recipe, show_progress=False)
    assert not list(tmp_path.iterdir())


def ask(graph: CausalLM, data: Data) -> None:
    features = encode_pictures(graph, unique_pictures(data.all), "cpu")
    ask_teacher(graph, length_batches(data.all, torch.device("cpu")), features)


def test_activations_that_overflow_name_the_conversation(small: Path) -> None:
    graph = load_model(small)
    data = read_data(small, graph, RECIPE, None)
    with torch.no_grad():
        ask(graph, data)
        decoder = graph.model.layers[0].input_layernorm.weight
        decoder.mul_(1e38)
        with pytest.raises(CalibrationError, match=r"model's activations are not.*jsonl, line \d"):
            ask(graph, data)
        decoder.mul_(1e-38)
        graph.visual.blocks[0].norm1.weight.mul_(1e38)
        with pytest.raises(CalibrationError, match=r"rows of picture 1 are not.*line \d.*leave"):
            ask(graph, data)


def test_one_bad_picture_is_told_from_its_neighbours(small: Path) -> None:
    graph = load_model(small)
    data = read_data(small, graph, RECIPE, None)
    features = encode_pictures(graph, unique_pictures(data.all), "cpu")
    bad = data.train[2]
    features[id(bad.images[0])][0, 0] = float("nan")
    batches = length_batches(data.all, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(CalibrationError, match=re.escape(bad.where)):
        ask_teacher(graph, batches, features)


@pytest.mark.parametrize(
    ("settings", "whose"),
    [
        (
            {"allocation": "model", "bits": 8.0, "permute": True},
            r"model\.layers\.0\.self_attn\.qkv_proj",
        ),
        ({"max_codebook_overhead": 0.0}, r"visual-blocks-attn-qkv-\d+x\d+"),
        ({}, r"visual\.patch_embed\.proj"),
    ],
)
def test_a_moment_that_cannot_be_factored_is_named(
    settings: dict[str, Any],
    whose: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(ldl, "block_ldl", fail)
    recipe = QuantRecipe(**{**SMALL, **settings})
    with pytest.raises(CalibrationError, match=f"^{whose} cannot be rounded: the second moment"):
        quantize(dense, tmp_path / "out", recipe, show_progress=False)


def test_a_conversation_beyond_the_context_is_named(small: Path, tmp_path: Path) -> None:
    rows = [llava_row("a.png"), llava_row("b.png")]
    rows[1]["conversations"][1]["value"] = "one two " * 3000
    pictures = {"a.png": picture(0), "b.png": picture(1)}
    path = write_calibration(tmp_path / "c.zip", rows, pictures)
    with pytest.raises(CalibrationError, match=r"line 2: \d+ tokens.*at most 2048: shorten"):
        read_data(small, load_model(small), RECIPE, path)


ROWS: list[tuple[Any, str]] = [
    ({**llava_row("a.png"), "image": 7}, '"image" must be a file name or a list of them: 7'),
    ({**llava_row("a.png"), "image": ["a.png", None]}, '"image" must be a file name'),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, 'a turn must have "from"'),
    (llava_row("a\0.png"), "leads out of it"),
    ([llava_row("a.png")], "expected a JSON object, found list"),
]


@pytest.mark.parametrize(("row", "message"), ROWS)
def test_rows_of_strange_types_are_named(
    row: Any, message: str, small: Path, tmp_path: Path
) -> None:
    path = write_calibration(tmp_path / "c.zip", [llava_row("a.png"), row], {"a.png": picture(0)})
    with pytest.raises(DataError, match="line 2") as caught:
        load_conversations(path, small)
    assert message in str(caught.value)


def test_a_damaged_archive_names_the_picture(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.png", b"picture " * 5000)
        archive.writestr("rows.jsonl", json.dumps(llava_row("a.png")))
    data = bytearray(path.read_bytes())
    data[45:60] = b"\xff" * 15  # in the deflated bytes of the picture
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"line 1.*images/a\.png' cannot be read"):
        _ = load_conversations(path, small)[1][0].pictures


def test_bare_pictures_that_cannot_be_used_are_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"b\.png, question 1"):
        read_data(small, load_model(small), RECIPE, tmp_path)
    read = Path.read_bytes

    def fail(self: Path) -> bytes:
        if self.name == "a.png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"'a\.png' cannot be read.*Permission denied"):
        _ = load_conversations(tmp_path, small)[1][0].pictures


def test_pictures_that_nobody_answers_about_are_said_to_teach_little(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, untuned = tmp_path / "pictures", dataclasses.replace(RECIPE, tuning_steps=0)
    bare.mkdir()
    (bare / "a.png").write_bytes(picture(0))
    quantize(small, tmp_path / "bare", untuned, bare, by_block=True)
    assert "pictures holds 4 questions without answers" in capsys.readouterr().err
    quantize(small, tmp_path / "answered", untuned, by_block=True)
    quantize(small, tmp_path / "by itself", untuned, bare)
    assert "without answers" not in capsys.readouterr().err


def test_line_breaks_inside_strings_are_text(tmp_path: Path) -> None:
    row = {"conversations": "a\u2028b\x85c"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n{}\n", "utf-8")
    assert [found for _, found in read_rows(Archive(tmp_path), "r.jsonl")] == [row, {}]


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.zip"])
def test_an_empty_file_is_no_data(name: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=re.escape(name)):
        load_conversations(tmp_path / name, small)


def test_the_room_that_is_needed_is_what_a_checkpoint_takes(
    dense: Path, quantized: tuple[Path, Report]
) -> None:
    counted = sum(expected_bytes(load_model(dense), QuantRecipe(**QUICK)))
    stored = (quantized[0] / "model.safetensors").stat().st_size
    assert 0.7 * stored < counted < stored  # the header is a third of a file as small as this


def test_a_disk_without_room_is_refused_with_both_figures(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, output = load_model(small), tmp_path / "deep" / "out"
    matrices, others = expected_bytes(graph, RECIPE)
    free = 2 * matrices + others
    asked = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(10**12, 0, free)

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    check_room(graph, RECIPE, output, tmp_path / "out.partial")
    free -= 1
    with pytest.raises(CheckpointError, match=f"at least {free + 1:,} bytes .*{free:,} are free"):
        quantize(small, output, RECIPE, show_progress=False)
    assert asked == [tmp_path, tmp_path]
    assert not output.parent.exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "a.safetensors").write_bytes(b"1")  # what is there needs no room
    check_room(graph, RECIPE, output, tmp_path / "out.partial")
