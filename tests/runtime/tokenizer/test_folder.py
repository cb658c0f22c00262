"""Tokenizer folders: where the template comes from, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgvq_runtime.errors import RequestError, TokenizerError
from mgvq_runtime.tokenizer import Tokenizer
from mgvq_runtime.tokenizer.chat_template import QWEN2_VL_TEMPLATE, ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tokenizer's files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    return tmp_path


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def test_the_template_that_counts(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.pop("chat_template"))
    built_in = ChatTemplate(QWEN2_VL_TEMPLATE).render(HELLO)
    assert Tokenizer.from_folder(folder).render(HELLO) == built_in
    named: list[dict[str, Any]] = [{"name": [1], "template": "no"}, {"template": "no"}]
    named += [{"name": "tool", "template": "t"}, {"name": "default", "template": "named"}]
    edit(folder, "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert Tokenizer.from_folder(folder).render(HELLO) == "named"
    (folder / "chat_template.json").write_text('{"chat_template": "from json{{ eos_token }}"}')
    assert Tokenizer.from_folder(folder).render(HELLO) == "from json<|im_end|>"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.from_folder(folder).render(HELLO) == "from jinja"


def test_an_added_token_inside_the_vocabulary_stays_out_of_reach(folder: Path) -> None:
    """Some tokenizers list their special tokens in the model's vocabulary as well."""

    def change(definition: dict[str, Any]) -> None:
        definition["model"]["ignore_merges"] = True
        for token in definition["added_tokens"]:
            definition["model"]["vocab"][token["content"]] = token["id"]
        definition["pre_tokenizer"]["pretokenizers"] = definition["pre_tokenizer"]["pretokenizers"][
            1:
        ]

    edit(folder, "tokenizer.json", change)
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("<|im_end|>")
    assert not set(ids) & set(tokenizer.added_tokens.values())
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_the_longest_literal_wins_and_strips(folder: Path) -> None:
    def change(definition: dict[str, Any]) -> None:
        number = max(token["id"] for token in definition["added_tokens"])
        definition["added_tokens"] += [
            {"id": number + 1, "content": "<a>", "special": True},
            {"id": number + 2, "content": "<a><b>", "special": False, "rstrip": True},
            {"id": number + 3, "content": "cat", "single_word": True, "lstrip": True},
        ]

    edit(folder, "tokenizer.json", change)
    tokenizer = Tokenizer.from_folder(folder)
    a, ab, cat = (tokenizer.added_tokens[text] for text in ("<a>", "<a><b>", "cat"))
    assert tokenizer.encode("<a><a><b>  <a> cat", True) == [a, ab, a, cat]
    assert cat not in tokenizer.encode("concat", True)


def test_many_spaces_cost_little(folder: Path) -> None:
    """Phi-4 has some ninety tokens that take the spaces in front along."""

    def change(definition: dict[str, Any]) -> None:
        number = max(token["id"] for token in definition["added_tokens"]) + 1
        flags = {"special": True, "lstrip": True, "rstrip": True}
        definition["added_tokens"] += [
            {"id": number + i, "content": f"<|dummy_{i}|>", **flags} for i in range(90)
        ]

    edit(folder, "tokenizer.json", change)
    tokenizer = Tokenizer.from_folder(folder)
    start = time.process_time()
    text = " " * 4000 + "x"
    assert tokenizer.encode_chat([{"role": "user", "content": text}])
    assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text)
    assert time.process_time() - start < 5


def test_a_text_the_tokenizer_gives_up_on(folder: Path) -> None:
    """Rust's panics are no Exception in Python."""
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit(folder, "tokenizer.json", lambda d: d.update(pre_tokenizer=split))
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(RequestError, match="gives up on a text of 29 characters: .*retry-limit"):
        tokenizer.encode("a" * 28 + "b")
    assert tokenizer.encode("hello")


def test_truncation_and_padding_settings_are_not_obeyed(folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(folder, "tokenizer.json", lambda d: d.update(truncation=truncation))
    assert len(Tokenizer.from_folder(folder).encode("a b c d e f")) > 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda d: d["model"].update(type="Unigram"), "only byte-level BPE"),
        ("tokenizer.json", lambda d: d.update(decoder={"type": "Metaspace"}), "only byte-level"),
        ("tokenizer.json", lambda d: d.update(decoder=None), "only byte-level BPE"),
        ("tokenizer.json", lambda d: d.update(model=[]), "only byte-level BPE"),
        ("tokenizer.json", lambda d: d["model"].update(vocab=[]), "vocabulary must be an object"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(x=-1), "vocabulary must be"),
        ("tokenizer.json", lambda d: d["model"].update(merges=["q"]), "cannot be built"),
        (
            "tokenizer.json",
            lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "cannot be built: Precompiled",
        ),
        ("tokenizer.json", lambda d: d.update(added_tokens={"a": 1}), "must be a list"),
        (
            "tokenizer.json",
            lambda d: d.update(added_tokens=[{"id": 1}]),
            "added token is malformed",
        ),
        ("tokenizer.json", lambda d: d.update(added_tokens=[3]), "added token is malformed"),
        (
            "tokenizer.json",
            lambda d: d["added_tokens"][0].update(content="<|other|>"),
            "files disagree",
        ),
        (
            "tokenizer_config.json",
            lambda d: d.update(added_tokens_decoder={"x": {}}),
            "added token is malformed",
        ),
        ("tokenizer_config.json", lambda d: d.update(chat_template=3), "must be a text"),
        ("tokenizer_config.json", lambda d: d.update(chat_template="{% x"), "not valid Jinja"),
    ],
)
def test_what_is_refused(
    folder: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, name, change)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"model": 1}'])
def test_files_that_are_no_tokenizer(folder: Path, data: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(TokenizerError):
        Tokenizer.from_folder(folder)


def test_a_bad_end_of_sequence_id(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "im_end"}')
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id must be"):
        Tokenizer.from_folder(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json, vocab\.json and"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match="no sentencepiece model: it holds no pieces"):
        Tokenizer.from_folder(tmp_path)
