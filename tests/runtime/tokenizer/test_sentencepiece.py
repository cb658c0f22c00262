"""A `tokenizer.model` read by us: ids as sentencepiece's own and as transformers' conversion."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece

from mgvq_runtime.errors import TokenizerError
from mgvq_runtime.tokenizer import IncrementalDetokenizer, Tokenizer
from mgvq_runtime.tokenizer.folder import missing_tokenizer_json
from tests.runtime.tokenizer.sentencepiece_folders import FOLDERS, UNUSED, llama_folder, train

PIECES = (
    "What is in the picture?", " the", "Describe", "\n", "\n\n", "  ", "\t", "é", "日本", "画像",
    "🌍", "\u2581", "12345", "isn't", "<", ">", "|", "<0x0A>", "<s>", "fox ", " ", "Ü", "ﬁ", "...",
    "helpful assistant.", "\r\n", "\u200b", "three red circles", "</s>", "<unk>",
)  # fmt: skip


def random_text(draw: random.Random) -> str:
    pieces = draw.choices(PIECES, k=draw.randrange(7))
    pieces += draw.choices(string.printable, k=draw.randrange(4))
    draw.shuffle(pieces)
    return "".join(pieces)


def random_conversation(draw: random.Random) -> list[dict[str, str]]:
    roles = ["system"] if draw.random() < 0.4 else []
    roles += ["user", "assistant"] * draw.randrange(2) + ["user"]
    return [{"role": role, "content": random_text(draw)} for role in roles]


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def starts_with_space(text: str) -> bool:
    """Where only a text's beginning gets a space, transformers gives none to one that has one."""
    return text.startswith((" ", "\u2581"))


def converted_by_transformers(processor: Any, is_legacy: bool) -> Any:
    """transformers' conversion, fed with what sentencepiece says of its own pieces."""
    from transformers.convert_slow_tokenizer import SpmConverter

    kinds = {
        **dict.fromkeys((i for i in range(len(processor)) if processor.is_byte(i)), 6),
        **dict.fromkeys((i for i in range(len(processor)) if processor.is_control(i)), 3),
        processor.unk_id(): 2,
        **{i: 4 for i in range(len(processor)) if processor.id_to_piece(i) in UNUSED},
    }
    pieces = [
        SimpleNamespace(
            piece=processor.id_to_piece(i), score=processor.get_score(i), type=kinds.get(i, 1)
        )
        for i in range(len(processor))
    ]
    has_prefix = processor.encode("The", out_type=str)[0].startswith("\u2581")
    proto = SimpleNamespace(
        pieces=pieces,
        trainer_spec=SimpleNamespace(byte_fallback=True, unk_piece="<unk>", unk_id=0),
        normalizer_spec=SimpleNamespace(
            precompiled_charsmap=b"",
            remove_extra_whitespaces=False,
            escape_whitespaces=True,
            add_dummy_prefix=has_prefix,
        ),
    )
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    return SpmConverter.build_tokenizer_from_spm_proto(proto, vocab, legacy=is_legacy)


def test_ids_are_sentencepieces(folder: Path, ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(3)
    num_ids = 0
    for _ in range(500):
        text = random_text(draw)
        if starts_with_space(text) and "phi3" in str(folder):
            continue
        ids = ours.encode(text)
        assert ids == theirs.encode(text), repr(text)
        assert not set(ids) & ours.special_token_ids
        num_ids += len(ids)
    assert num_ids > 5000


def test_ids_are_those_of_transformers_conversion(
    folder: Path, ours: Tokenizer, theirs: Any
) -> None:
    converted = converted_by_transformers(theirs, is_legacy="phi3" not in str(folder))
    draw = random.Random(4)
    for _ in range(300):
        text = random_text(draw)
        if any(literal in text for literal in ("<s>", "</s>", "<unk>", "<0x0A>")):
            continue  # there, a text may spell a special piece
        assert ours.encode(text) == converted.encode(text, add_special_tokens=False).ids, repr(text)


def test_text_comes_back(folder: Path, ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(5)
    for _ in range(300):
        text = random_text(draw).replace("\u2581", "")
        if starts_with_space(text) and "phi3" in str(folder):
            continue
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        detokenizer = IncrementalDetokenizer(ours)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with our tokenizer.json in the place of the older files, as it is shipped."""
    target = tmp_path_factory.mktemp("written") / "model"
    shutil.copytree(folder, target)
    data = missing_tokenizer_json(folder)
    assert data is not None
    (target / "tokenizer.json").write_bytes(data)
    (target / "tokenizer.model").unlink()
    (target / "added_tokens.json").unlink()
    assert missing_tokenizer_json(target) is None
    return target


def test_conversations_of_the_written_file(ours: Tokenizer, written: Path) -> None:
    """Our reading of the older files, ours of the new one and transformers' of it are one."""
    from transformers import PreTrainedTokenizerFast

    again = Tokenizer.from_folder(written)
    reference = PreTrainedTokenizerFast.from_pretrained(written)
    draw = random.Random(6)
    for _ in range(200):
        messages = random_conversation(draw)
        if any(name in m["content"] for m in messages for name in ours.added_tokens):
            continue  # transformers takes what users type for special tokens
        if any(m["content"].startswith((" ", "\u2581")) for m in messages):
            continue  # transformers strips it behind a token that eats spaces, as a template's
        ids = ours.encode_chat(messages)
        assert again.encode_chat(messages) == ids
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert ids == list(expected), messages
    assert again.special_token_ids == ours.special_token_ids
    assert again.eos_token_ids == ours.eos_token_ids != frozenset()
    assert again.vocab_size == ours.vocab_size
    bare = reference("three red circles")["input_ids"]
    assert [*ours.opening_ids, *ours.encode("three red circles")] == bare
    assert again.opening_ids == ours.opening_ids == (ours.special_id("<s>"),)


def test_users_cannot_write_special_tokens(ours: Tokenizer) -> None:
    for literal in (*ours.added_tokens, "<0x0A>", *UNUSED):
        for text in (literal, f"a{literal}b", literal * 2):
            assert not set(ours.encode(text)) & set(ours.added_tokens.values()), text
            assert ours.decode(ours.encode(text)) == text
            empty = ours.encode_chat([{"role": "user", "content": ""}])
            typed = ours.encode_chat([{"role": "user", "content": text}])
            specials = [[i for i in ids if i in ours.special_token_ids] for ids in (empty, typed)]
            assert specials[0] == specials[1]


def test_symbols_the_trainer_was_told_stay_out_of_reach(tmp_path: Path) -> None:
    """`<start_of_turn>` may be one; in the tokenizer.json we write it is not special either."""
    from transformers import PreTrainedTokenizerFast

    folder = llama_folder(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(train(user_defined_symbols=["<turn>"]))
    (folder / "added_tokens.json").unlink()
    data = missing_tokenizer_json(folder)
    first = Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_bytes(data or b"")
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    for tokenizer in (first, Tokenizer.from_folder(folder)):
        number = tokenizer.added_tokens["<turn>"]
        assert number not in tokenizer.special_token_ids
        assert number not in tokenizer.encode("<turn>")
        assert number not in tokenizer.encode_chat([{"role": "user", "content": "a<turn>"}])
        assert number in tokenizer.encode("a<turn>", allow_special=True)
        assert number in reference.encode("a<turn>")


@pytest.mark.parametrize("as_text", [False, True])
def test_merges_that_spell_special_tokens(tmp_path: Path, as_text: bool) -> None:
    """Some published tokenizer.json files merge letters to "<s>" and "<unk>", or look words up."""
    folder = llama_folder(tmp_path / "model")
    definition = json.loads(missing_tokenizer_json(folder) or b"")
    model = definition["model"]
    words = ("<", ">", "s>", "unk>", "un", "k>")
    for word in words:
        model["vocab"].setdefault(word, 600 + words.index(word))
    extra = [["u", "n"], ["k", ">"], ["un", "k>"], ["s", ">"], ["<", "s>"], ["<", "unk>"]]
    merges = extra + model["merges"]
    model["merges"] = [" ".join(pair) for pair in merges] if as_text else merges
    model["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "added_tokens.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    for literal in ("<s>", "<unk>", "a<s>b<unk>"):
        ids = tokenizer.encode(literal)
        assert not set(ids) & {0, 1, 2}
        assert tokenizer.decode(ids) == literal


def test_picture_tokens_of_internlm2(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(FOLDERS["internlm2"](tmp_path / "model"))
    assert tokenizer.special_id("IMG_CONTEXT") == tokenizer.vocab_size - 1
    assert tokenizer.special_id("im_end") < tokenizer.special_id("<img>")
    ids = tokenizer.encode("<|im_end|><img>", allow_special=True)
    assert ids == [tokenizer.special_id("im_end"), tokenizer.special_id("<img>")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is no sentencepiece model|not a byte-pair"),
        (lambda data: b"", "it holds no pieces"),
        (lambda data: b"\xff" * 40, "longer than 64 bits"),
        (lambda data: b"\x0a\xff\xff\xff\xff\x0f" + data, "ends behind the end of the file"),
        (lambda data: b"\x0b" + data, "unknown type 3"),
        (lambda data: b"\x0a\x04\x0a\x02\xff\xfe", "is no sentencepiece model"),
        (lambda data: b"\x0a\x02\x08\x07" + data, "is no sentencepiece model"),
        (lambda data: b"\x0a\x05\x0a\x01a\x12\x00" + data, "is no sentencepiece model"),
        (lambda data: data + b"\x1a\x02\x10\x07", "its normalization table is a number"),
        (lambda data: data + b"\x1a\x05\x12\x03abc", "cannot be built: Precompiled"),
        (lambda data: train(model_type="unigram", vocab_size=340), "not a byte-pair"),
    ],
)
def test_damaged_and_other_models(tmp_path: Path, damage: Any, message: str) -> None:
    folder = llama_folder(tmp_path / "model")
    path = folder / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)
