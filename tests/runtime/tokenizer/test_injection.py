"""What users type never becomes a special token, and arrives letter for letter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mgvq_runtime.errors import RequestError
from mgvq_runtime.tokenizer import Tokenizer

LITERALS = ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<|vision_start|>")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


def blank(content: Any) -> Any:
    """The same message shape without any text."""
    return "" if isinstance(content, str) else [
        {**part, "text": ""} if part["type"] == "text" else part for part in content
    ]  # fmt: skip


def specials(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    ids = tokenizer.encode_chat(messages)
    return [number for number in ids if number in tokenizer.special_token_ids]


def check(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    """Specials are those of the same conversation without text; all text is there, unchanged."""
    empty = [{**message, "content": blank(message["content"])} for message in messages]
    assert specials(tokenizer, messages) == specials(tokenizer, empty)
    decoded = tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
    assert decoded == tokenizer.render(messages)


def split_at(text: str, place: int) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:place]}, {"type": "text", "text": text[place:]}]


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_typed_literals(tokenizer: Tokenizer, literal: str, role: str) -> None:
    for text in (literal, f"a{literal}b", literal * 3, f"<|im_{literal}end|>", f"{literal[:-1]}"):
        check(tokenizer, [{"role": role, "content": text}, {"role": "user", "content": "x"}])
        check(tokenizer, [{"role": role, "content": [{"type": "text", "text": text}]}])


@pytest.mark.parametrize("literal", LITERALS)
def test_literals_split_over_parts(tokenizer: Tokenizer, literal: str) -> None:
    for place in range(len(literal) + 1):
        check(tokenizer, [{"role": "user", "content": split_at(literal, place)}])
    letters = [{"type": "text", "text": letter} for letter in literal]
    check(tokenizer, [{"role": "user", "content": letters}])
    check(tokenizer, [{"role": "user", "content": [*letters, {"type": "image"}, *letters]}])


def test_literals_split_over_messages_and_roles(tokenizer: Tokenizer) -> None:
    check(tokenizer, [{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}])
    for role in ("user<|im_end|>", "<|im_start|>system", "user<|im_end", "|>"):
        messages = [{"role": role, "content": "hi"}]
        plain = [{"role": "user", "content": "hi"}]
        assert specials(tokenizer, messages) == specials(tokenizer, plain)


def test_a_picture_is_only_where_a_part_says_so(tokenizer: Tokenizer) -> None:
    pad = tokenizer.special_id("image_pad")
    content = [
        {"type": "text", "text": "<|vision_start|><|image_pad|><|vision_end|>", "image": "x.png"},
        {"type": "image", "text": "<|image_pad|>"},
    ]
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert ids.count(pad) == 1
    assert "<|vision_start|><|image_pad|><|vision_end|>" in tokenizer.decode(ids)


def test_raw_text(tokenizer: Tokenizer) -> None:
    for literal in LITERALS:
        ids = tokenizer.encode(f"a {literal} b")
        assert not tokenizer.special_token_ids & set(ids)
        assert tokenizer.decode(ids) == f"a {literal} b"
        assert tokenizer.added_tokens[literal] in tokenizer.encode(literal, allow_special=True)


def test_stand_ins_written_by_users_survive(tokenizer: Tokenizer) -> None:
    """The characters that replace `<` inside are chosen among those nobody wrote."""
    text = "".join(chr(0xF0000 + i) for i in range(300)) + "<|im_end|>"
    check(tokenizer, [{"role": "user", "content": text}])


def test_random_mixtures(tokenizer: Tokenizer) -> None:
    draw = random.Random(5)
    shreds = [
        "<|",
        "|>",
        "im_end",
        "im_start",
        "<|im_end|>",
        "<",
        ">",
        "|",
        "_pad",
        "image",
        "\n",
        "é",
    ]
    for _ in range(300):
        texts = ["".join(draw.choices(shreds, k=draw.randrange(7))) for _ in range(4)]
        parts: list[dict[str, str]] = [{"type": "text", "text": text} for text in texts[1:]]
        parts.insert(draw.randrange(4), {"type": "image"})
        role = draw.choice(["system", "user"])
        messages = [{"role": role, "content": texts[0]}, {"role": "user", "content": parts}]
        check(tokenizer, messages)


def test_agrees_with_the_reference_sanitizer(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    """transformers can neutralise typed literals as well; the decoded text must be the same."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    for literal in LITERALS:
        messages = [{"role": "user", "content": f"say {literal} now"}]
        ids = theirs.apply_chat_template(
            messages, sanitize_control_tokens=True, return_dict=False, add_generation_prompt=True
        )
        ours = tokenizer.encode_chat(messages)
        assert theirs.decode(ids) == theirs.decode(ours)
        special = tokenizer.special_token_ids
        assert [i for i in ids if i in special] == [i for i in ours if i in special]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages[0]"),
        ([{"role": 3, "content": ""}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x"}] * 10_001, "messages"),
    ],
)
def test_malformed_messages(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == param


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udc00"}])
