"""Ids and text against transformers: random conversations, raw text, decoding of any ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mgvq_runtime.tokenizer import IncrementalDetokenizer, Tokenizer

PIECES = (
    "What is in the picture?", " the", "Describe it", "\n", "\n\n", "  ", "\t", "é", "e\u0301", "日本語",  # noqa: E501
    "🌍", "👩‍👩‍👧", "\u200b", "İ", "1234567890", "don't", "I'LL", "<", ">", "|", "<|", "|>", "im_end",  # noqa: E501
    "\r\n", "...", "¿Qué?", "العربية", "ﬁ", "\x00", "\ufeff", "Å", "{{ x }}", "{% if %}", "\\n", "'", '"',  # noqa: E501
)  # fmt: skip


def random_text(draw: random.Random) -> str:
    pieces = draw.choices(PIECES, k=draw.randrange(8))
    pieces += [chr(draw.randrange(32, 0x2FFF)) for _ in range(draw.randrange(3))]
    draw.shuffle(pieces)
    return "".join(pieces)


def random_content(draw: random.Random) -> Any:
    if draw.random() < 0.4:
        return random_text(draw)
    image, text = {"type": "image"}, {"type": "text"}
    kinds = draw.choices([image, text], k=draw.randrange(5))
    return [dict(k) if k is image else {**k, "text": random_text(draw)} for k in kinds]


def random_conversation(draw: random.Random) -> list[dict[str, Any]]:
    roles = ["system"] if draw.random() < 0.4 else []
    roles += ["user", "assistant"] * draw.randrange(3) + ["user"]
    return [{"role": role, "content": random_content(draw)} for role in roles]


@pytest.fixture(scope="module")
def theirs(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def ours(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


def their_ids(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def test_conversations(ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(11)
    num_images = 0
    for _ in range(400):
        messages = random_conversation(draw)
        opened = draw.random() < 0.7
        expected = their_ids(theirs, messages, add_generation_prompt=opened)
        assert ours.encode_chat(messages, opened) == expected, messages
        rendered = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened
        )
        assert ours.render(messages, opened) == rendered
        assert ours.encode(rendered, allow_special=True) == expected
        num_images += expected.count(ours.special_id("image_pad"))
    assert num_images > 200


def test_thoughts_leave_the_history(thinking_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_folder(thinking_folder)
    theirs = AutoTokenizer.from_pretrained(thinking_folder)
    for answer in (
        "<think>\nlong</think>\n\nTwo.",
        "Two.",
        "</think>",
        "a<think>b",
        "</think",
        "é<",
    ):
        messages = [
            {"role": "user", "content": "<think>1 < 2 > 0</think>?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "sure?"},
        ]
        expected = their_ids(theirs, messages, add_generation_prompt=True)
        assert ours.encode_chat(messages) == expected, answer
        assert ours.encode(answer) == theirs.encode(answer, add_special_tokens=False)


def test_tokens_that_take_spaces_along(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    from tests.runtime.conftest import train_tokenizer

    tokenizer = train_tokenizer()
    flags = [(left, right) for left in (False, True) for right in (False, True)]
    names = [f"<{i}>" for i in range(4)]
    tokenizer.add_special_tokens(
        [
            AddedToken(name, lstrip=left, rstrip=right, special=True, normalized=False)
            for name, (left, right) in zip(names, flags, strict=True)
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    draw = random.Random(15)
    for _ in range(400):
        text = "".join(draw.choices([*names, " ", "  ", "\n", "\u3000", "a", "<"], k=9))
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == expected, text


def test_text(ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(12)
    for _ in range(400):
        text = random_text(draw)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_decoding_any_ids(ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(13)
    for _ in range(600):
        ids = [draw.randrange(ours.vocab_size + 20) for _ in range(draw.randrange(40))]
        for skip in (True, False):
            text = ours.decode(ids, skip)
            assert text == theirs.decode(ids, skip_special_tokens=skip), ids
            detokenizer = IncrementalDetokenizer(ours, skip)
            deltas = [detokenizer.push(number) for number in ids]
            assert "".join(deltas) + detokenizer.flush() == text
            assert detokenizer.flush() == ""


def test_split_characters_are_held_back(ours: Tokenizer) -> None:
    """A character over four one-byte tokens appears with its last byte, never as U+FFFD."""
    byte_ids = {ours.token_bytes(i): i for i in range(256)}
    detokenizer = IncrementalDetokenizer(ours)
    deltas = [detokenizer.push(byte_ids[bytes([byte])]) for byte in "a🌍é".encode()]
    assert deltas == ["a", "", "", "", "🌍", "", "é"]
    assert detokenizer.push(byte_ids[b"\xf0"]) == ""
    assert detokenizer.push(byte_ids[b"a"]) == "\ufffda"
    assert detokenizer.push(byte_ids[b"\xe2"]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(byte_ids[b"b"]) == "b"


def test_vocab_and_merges_make_the_same_tokenizer(
    tokenizer_folder: Path, tmp_path: Path, ours: Tokenizer
) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    older = Tokenizer.from_folder(tmp_path)
    assert older.added_tokens == ours.added_tokens
    draw = random.Random(14)
    for _ in range(100):
        messages = random_conversation(draw)
        assert older.encode_chat(messages) == ours.encode_chat(messages)


def test_ids_that_end_an_answer(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The union of what three files say: an integer, a list, a token's text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    end = Tokenizer.from_folder(tmp_path).special_id("<|im_end|>")
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {end}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 3}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {end, 3, 4, 5}


def test_special_ids_by_name(ours: Tokenizer) -> None:
    assert ours.special_id("image_pad") == ours.added_tokens["<|image_pad|>"]
    assert ours.special_id("<|im_end|>") in ours.special_token_ids
    with pytest.raises(ValueError, match="no special token 'IMG'; there are: .*im_start"):
        ours.special_id("IMG")
    assert ours.token_bytes(ours.vocab_size + 5) == b""
    assert ours.token_bytes(ours.special_id("im_end")) == b"<|im_end|>"


@pytest.mark.parametrize("said_by", ["tokenizer.json", "sequence", "nobody"])
def test_what_begins_a_bare_text(tokenizer_folder: Path, tmp_path: Path, said_by: str) -> None:
    """As transformers puts the first token in front, wherever the folder says so."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": "<|im_start|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_bos_token"] = True  # not heard where there is a tokenizer.json
    path.write_text(json.dumps(config))
    definition = json.loads((folder / "tokenizer.json").read_text())
    number = Tokenizer.from_folder(folder).special_id("im_start")
    step = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [number], "tokens": ["<|im_start|>"]}
        },
    }
    if said_by == "tokenizer.json":
        definition["post_processor"] = step
    elif said_by == "sequence":
        byte_level = definition["post_processor"]
        definition["post_processor"] = {"type": "Sequence", "processors": [byte_level, step]}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    expected = theirs("What is in the picture?")["input_ids"]
    assert [*ours.opening_ids, *ours.encode("What is in the picture?")] == expected
    assert bool(ours.opening_ids) == (said_by != "nobody")
