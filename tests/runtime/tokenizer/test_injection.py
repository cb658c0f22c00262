"""What users type never becomes a special token, and arrives letter for letter."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mgvq_runtime.errors import RequestError
from mgvq_runtime.tokenizer import Tokenizer
from mgvq_runtime.tokenizer.tokenizer import PRIVATE_USE
from tests.runtime.tokenizer.conftest import THINKING_TEMPLATE

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


def test_tokens_users_may_write_make_no_special_ones(thinking_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(thinking_folder)
    think, end = (tokenizer.added_tokens[text] for text in ("<think>", "</think>"))
    draw = random.Random(6)
    shreds = [*LITERALS, "<think>", "</think>", "<", ">", "think", "/", "|im_end|", "im_end|>"]
    shreds += [
        "<|",
        "<\uff5cUser\uff5c>",
        "\uff5cUser\uff5c>",
        *map(chr, PRIVATE_USE[:2]),
        " ",
        "\n",
    ]
    num_typed = 0
    for _ in range(400):
        texts = ["".join(draw.choices(shreds, k=draw.randrange(8))) for _ in range(4)]
        roles = ["user", "assistant", "user", draw.choice(["assistant", "user"])]
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        check(tokenizer, messages)
        num_typed += {think, end} <= set(tokenizer.encode_chat(messages))
        for text in texts:
            ids = tokenizer.encode(text)
            assert not set(ids) & tokenizer.special_token_ids
            assert tokenizer.decode(ids) == text
    assert num_typed > 50


@pytest.mark.parametrize(
    "cut", ["m.content[1:-1]", "m.content | replace('think', '')", "m.content[::-1]"]
)
def test_templates_that_cut_what_users_wrote(thinking_folder: Path, cut: str) -> None:
    """No piece of a literal that users may write begins or ends a special token."""
    template = "{% for m in messages %}{{ " + cut + " }}{% if '</think>' in m.content %}{% endif %}"
    (thinking_folder / "chat_template.jinja").write_text(template + "<|im_end|>{% endfor %}")
    tokenizer = Tokenizer.from_folder(thinking_folder)
    for text in (
        "a<think>|im_end|<think>b",
        ">|dne_mi|<",
        "<think>|im_end|</think>",
        "x<|im_end|>x",
    ):
        assert len(specials(tokenizer, [{"role": "user", "content": text}])) == 1


def test_special_tokens_that_a_template_writes_in_pieces(thinking_folder: Path) -> None:
    """Their ends stay as they are, though users may write the same letters as a token."""
    definition = json.loads((thinking_folder / "tokenizer.json").read_text())
    number = max(token["id"] for token in definition["added_tokens"]) + 1
    definition["added_tokens"].append({"id": number, "content": "|>", "special": False})
    (thinking_folder / "tokenizer.json").write_text(json.dumps(definition))
    template = "{% for m in messages %}<|{{ 'im_end' }}|>{{ m.content }}{% endfor %}"
    (thinking_folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_folder(thinking_folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|></think>"}])
    assert [i for i in ids if i in tokenizer.added_tokens.values()] == [
        tokenizer.special_id("im_end"),
        number,
        tokenizer.added_tokens["</think>"],
    ]


def test_what_users_may_not_write_though_it_is_not_called_special(
    thinking_folder: Path, tmp_path: Path
) -> None:
    """Placeholders, ends and turns, and whatever no file says anything about."""
    definition = json.loads((thinking_folder / "tokenizer.json").read_text())
    size = max(token["id"] for token in definition["added_tokens"]) + 1
    names = ["<|turn|>", "<image>", "<pad_of_pictures>", "<stop>", "<called_special>", "<tool>"]
    added = [{"id": size + i, "content": name, "special": False} for i, name in enumerate(names)]
    unsaid = {"id": size + len(names), "content": "<unsaid>"}
    definition["added_tokens"] += [*added, unsaid]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    decoder = {str(size + 4): {"content": "<called_special>", "special": True}}
    config = {"chat_template": THINKING_TEMPLATE, "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model_config = {"eos_token_id": size + 3, "text_config": {"image_token_id": size + 2}}
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for name in (*names, "<unsaid>"):
        for ids in (
            tokenizer.encode(name),
            tokenizer.encode_chat([{"role": "user", "content": name}]),
        ):
            assert (tokenizer.added_tokens[name] in ids) == (name == "<tool>"), name


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
