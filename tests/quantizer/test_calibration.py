"""What becomes of LLaVA rows and pictures, and what is said about rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgvq_quantizer import calibration
from mgvq_quantizer.archive import Archive, DataError
from mgvq_quantizer.batches import make_batch, split_batches
from mgvq_quantizer.calibration import (
    CalibrationError,
    Sample,
    load_conversations,
    show_other_pictures,
)
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.loading import load_model, model_config
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import llava_row, picture, write_calibration
from tests.runtime.family_folders import write_internvl_hub_folder


@pytest.fixture(scope="module")
def tools(dense: Path) -> tuple[ChatProcessor, Tokenizer]:
    tokenizer = Tokenizer.from_folder(dense)
    images = Qwen2VLImageProcessor.from_folder(dense, None)
    return ChatProcessor(tokenizer, images, load_model(dense).config), tokenizer


def prepare(path: Path | None, dense: Path, tools: tuple[ChatProcessor, Tokenizer]) -> list[Sample]:
    return calibration.prepare(load_conversations(path, dense)[1], *tools)


def test_every_answer_is_found_and_nothing_else(
    dense: Path, tools: tuple[ChatProcessor, Tokenizer]
) -> None:
    tokenizer = tools[1]
    sample = prepare(None, dense, tools)[0]
    said = tokenizer.decode(sample.token_ids[sample.is_answer], skip_special_tokens=False)
    assert said == "three<|im_end|>one blue<|im_end|>"
    whole = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    assert whole.endswith("user\nAnd blue?\nassistant\none blue")
    assert sample.positions.shape == (3, len(sample.token_ids))
    last = sample.positions[:, -1]
    assert last[0] == last[1] == last[2] == sample.positions.max()


@pytest.mark.parametrize("template", ["Hermes-2", "phi3-chat"])
def test_answers_between_numbered_pictures(template: str, tmp_path: Path) -> None:
    """InternVL2 numbers pictures only where several come: a later one moves what is before it."""
    write_internvl_hub_folder(tmp_path / "model", template=template)
    turns = (
        ("human", "<image>\nHow many red circles are there?"),
        ("gpt", "a lazy dog"),
        ("human", "<image>\nAnd here?"),
        ("gpt", ""),
        ("human", "Describe it."),
        ("gpt", "one blue square"),
    )
    row = {"image": ["0.png", "1.png"], "conversations": []}
    row["conversations"] = [{"from": who, "value": text} for who, text in turns]
    pictures = {f"{i}.png": picture(i) for i in range(2)}
    path = write_calibration(tmp_path / "data.zip", [row], pictures)
    checkpoint = open_checkpoint(tmp_path / "model")
    processor = ChatProcessor.from_checkpoint(checkpoint, model_config(checkpoint))
    tokenizer = processor.tokenizer
    (sample,) = prepare(path, tmp_path, (processor, tokenizer))
    said = tokenizer.decode(sample.token_ids[sample.is_answer], skip_special_tokens=False)
    end = "<|end|>" if template == "phi3-chat" else "<|im_end|>"
    assert said == f"a lazy dog{end}{end}one blue square{end}"


def test_a_picture_shown_twice_is_one_object(
    dense: Path, tmp_path: Path, tools: tuple[ChatProcessor, Tokenizer]
) -> None:
    rows = [llava_row("a.png"), llava_row("b.png"), llava_row("a.png")]
    pictures = {"a.png": picture(0), "b.png": picture(1)}
    path = write_calibration(tmp_path / "data.zip", rows, pictures)
    samples = prepare(path, dense, tools)
    assert samples[0].images[0] is samples[2].images[0]
    assert samples[0].images[0] is not samples[1].images[0]


def test_folders_lists_and_bare_pictures_work_alike(
    dense: Path, tmp_path: Path, tools: tuple[ChatProcessor, Tokenizer]
) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    bare = prepare(tmp_path, dense, tools)
    assert len(bare) > 1
    assert all(sample.is_answer.sum() == 1 for sample in bare)
    (tmp_path / "rows.json").write_text(json.dumps([llava_row("a.png")]))
    assert len(prepare(tmp_path, dense, tools)) == 1
    assert len(prepare(tmp_path / "rows.json", dense, tools)) == 1


def test_batches_hold_every_sample_and_point_at_the_rows_before_answers(
    dense: Path, tools: tuple[ChatProcessor, Tokenizer]
) -> None:
    samples = prepare(None, dense, tools)
    parts = split_batches(samples, 2 * len(samples[0].token_ids))
    assert [sample for part in parts for sample in part] == samples
    assert len(parts) > 1
    batch = make_batch(parts[0], "cpu")
    expected = [t for sample in batch.samples for t in sample.token_ids[sample.is_answer]]
    assert batch.token_ids[batch.answer_rows + 1].tolist() == expected


def test_other_pictures_fit_where_the_old_ones_were(
    dense: Path, tools: tuple[ChatProcessor, Tokenizer]
) -> None:
    samples = prepare(None, dense, tools)
    shown = show_other_pictures(samples, 3, seed=0)
    assert len(shown) == 3 * len(samples)
    changed = 0
    for old, new in zip(samples * 3, shown, strict=True):
        assert new.token_ids is old.token_ids
        assert new.images[0].grid_thw == old.images[0].grid_thw
        changed += new.images[0] is not old.images[0]
    assert changed > len(samples)
    again = show_other_pictures(samples, 3, seed=0)
    assert [s.images for s in again] == [s.images for s in shown]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"image": "a.png"}, 'expected "conversations"'),
    ({"conversations": [{"from": "robot", "value": "x"}]}, 'a turn must have "from"'),
    ({"conversations": [{"from": "human", "value": "hello"}]}, "nobody answers"),
    (llava_row("missing.png"), "missing.png"),
    (llava_row("../../secret.png"), "leads out of it"),
    ({**llava_row("a.png"), "image": ["a.png", "a.png"]}, "1 places say <image>, but 2"),
    (
        {"image": "a.png", "conversations": [{"from": "gpt", "value": "Hello"}]},
        "nobody asks about its picture",
    ),
    (llava_row("bad.png"), "line 2"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_row_that_cannot_be_used_is_named_with_its_line(
    row: dict[str, Any],
    message: str,
    dense: Path,
    tmp_path: Path,
    tools: tuple[ChatProcessor, Tokenizer],
) -> None:
    pictures = {"a.png": picture(0), "bad.png": picture(1)[:100]}
    path = write_calibration(tmp_path / "data.zip", [llava_row("a.png"), row], pictures)
    with pytest.raises(DataError, match="line 2") as caught:
        prepare(path, dense, tools)
    assert message in str(caught.value)


def test_pictures_of_rows_that_are_not_drawn_are_not_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(20)]
    path = write_calibration(
        tmp_path / "data.zip", [*map(llava_row, names)], {name: picture(0) for name in names}
    )
    read: list[str] = []
    read_picture = Archive.read_picture

    def note(self: Archive, name: str) -> bytes:
        read.append(name)
        return read_picture(self, name)

    monkeypatch.setattr(Archive, "read_picture", note)
    data = read_data(dense, load_model(dense), QuantRecipe(max_samples=4), path)
    assert read == [names[i] for i in (0, 5, 10, 15)], "drawn evenly, each read once"
    assert len(data.all) == 4


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_something_is_held_out_and_something_is_left(share: float, dense: Path) -> None:
    recipe = QuantRecipe(max_samples=4, heldout_share=share)
    data = read_data(dense, load_model(dense), recipe, None)
    assert len(data.heldout) == {0.01: 1, 0.5: 2, 0.99: 3}[share]
    assert len(data.all) == 4


def test_no_data_is_an_error_that_says_what_to_give(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        load_conversations(tmp_path / "nothing.zip", dense)
    with pytest.raises(CalibrationError, match="folder of pictures"):
        load_conversations(tmp_path, dense)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no conversations"):
        load_conversations(tmp_path / "rows.jsonl", dense)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        load_conversations(tmp_path / "rows.jsonl", dense)
    (tmp_path / "noise.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        load_conversations(tmp_path / "noise.zip", dense)
