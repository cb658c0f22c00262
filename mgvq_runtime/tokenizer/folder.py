"""The tokenizer files of a checkpoint folder (called by `tokenizer.Tokenizer.from_folder`).

Reads `tokenizer.json`, or makes one of `vocab.json` and `merges.txt` (Qwen2) or `tokenizer.model`
(sentencepiece); collects added tokens, end-of-sequence ids and the chat template from the files
beside it. Executes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq_runtime.checkpoint.files import read_bytes, read_json
from mgvq_runtime.errors import CheckpointError, TokenizerError
from mgvq_runtime.tokenizer.families import PLACEHOLDERS, family_template, missing_placeholder
from mgvq_runtime.tokenizer.sentencepiece_model import parse_model, to_definition

MAX_TOKENIZER_BYTES = 64 * 1024**2
"""tokenizer.json of a 150,000-token vocabulary is 7 to 12 MB."""

# Source: Qwen2's pre-tokenizer, tokenizer.json of Qwen/Qwen2-VL-2B-Instruct.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_COMMAND = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
"""How families spell what steers a conversation, whether their files call it special or not."""


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for a literal string, outside the model's merges."""

    id: int
    content: str
    is_special: bool
    """Left out of decoded text."""
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    is_typable: bool = False
    """Whether users may write it: it steers neither the conversation nor where pictures go."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer."""

    definition: dict[str, Any]
    """The contents of a tokenizer.json."""
    added_tokens: tuple[AddedToken, ...]
    eos_token_ids: frozenset[int]
    chat_template: str | None
    template_variables: Mapping[str, str]
    """`bos_token`, `eos_token` and their like, for the template."""
    opening: str | None = None
    """The literal that begins a text which no template has written, such as "<s>"."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read every tokenizer file of a folder.

    Raises:
        TokenizerError: if there is no tokenizer of a known kind, or its files are malformed or
            contradict each other.
    """
    try:
        config = _read_optional(folder / "special_tokens_map.json")
        config |= _read_optional(folder / "tokenizer_config.json")
        definition = _read_definition(folder, config)
        added = _added_tokens(definition, config, folder)
        model_config = _read_optional(folder / "config.json")
        added = _with_placeholder(added, model_config)
        variables = _template_variables(config)
        template, end = family_template(model_config, config, _read_template(folder, config))
        ends = {variables.get("eos_token"), end}
        eos = {token.id for token in added if token.content in ends}
        for name in ("config.json", "generation_config.json"):
            eos |= _eos_ids(_read_optional(folder / name), name)
        added = _without_reserved(added, eos | _config_ids(model_config))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    opening = _opening(folder, definition, config)
    return TokenizerFiles(definition, added, frozenset(eos), template, variables, opening)


def added_token_id(folder: Path, literal: str) -> int | None:
    """Return the id of an added token without making the tokenizer; None if there is none.

    Raises:
        TokenizerError: if a file is malformed.
    """
    try:
        definition = {}
        if (folder / "tokenizer.json").is_file():
            definition = read_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
        config = _read_optional(folder / "tokenizer_config.json")
        added = _added_tokens(definition, config, folder)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    return next((token.id for token in added if token.content == literal), None)


def missing_tokenizer_json(folder: Path) -> bytes | None:
    """Return the tokenizer.json that stands for a folder's older files; None if it has one.

    Raises:
        TokenizerError: as `read_tokenizer_files`.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    files = read_tokenizer_files(folder)
    added = [
        {
            "id": token.id,
            "content": token.content,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": False,
            "special": token.is_special,
            **({} if token.is_special or token.is_typable else {"typable": False}),
        }
        for token in sorted(files.added_tokens, key=lambda token: token.id)
    ]
    step = _opening_step(files) or files.definition.get("post_processor")
    whole = {**files.definition, "added_tokens": added, "post_processor": step}
    return json.dumps(whole, ensure_ascii=False).encode()


def _read_definition(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _qwen2_definition(folder)
    if (folder / "tokenizer.model").is_file():
        model = parse_model(read_bytes(folder / "tokenizer.model", MAX_TOKENIZER_BYTES))
        if config.get("add_prefix_space") is False:
            model = dataclasses.replace(model, adds_dummy_prefix=False)
        renamed = {token.id: token.content for token in _added_tokens({}, config, folder)}
        return to_definition(model, renamed, is_legacy=config.get("legacy") is not False)
    raise TokenizerError(
        f"{folder} has no tokenizer: expected tokenizer.json, vocab.json and merges.txt, or "
        "tokenizer.model"
    )


def _qwen2_definition(folder: Path) -> dict[str, Any]:
    """Return the tokenizer.json that Qwen2's two older files stand for."""
    lines = read_bytes(folder / "merges.txt", MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    merges = [line for line in lines.split("\n") if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES),
            "merges": [line.rstrip("\r") for line in merges],
        },
    }


def _added_tokens(
    definition: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> tuple[AddedToken, ...]:
    """Collect added tokens: tokenizer.json's, then those only the other files know."""
    listed = definition.get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    older = _read_optional(folder / "added_tokens.json")
    if not isinstance(listed, list) or not isinstance(decoder, dict):
        raise TokenizerError("added_tokens must be a list and added_tokens_decoder an object")
    entries = list(listed)
    try:
        entries += [{**entry, "id": int(number)} for number, entry in decoder.items()]
        entries += [{"content": text, "id": number} for text, number in older.items()]
        named = _named_specials(config)
        called = {entry["content"] for entry in entries if entry.get("special")} | named
        tokens = [_added_token(entry, named, called) for entry in entries]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(f"an added token is malformed: {error}") from error
    by_id: dict[int, AddedToken] = {}
    by_content: dict[str, int] = {}
    for token in tokens:
        other = by_id.setdefault(token.id, token).content
        other_id = by_content.setdefault(token.content, token.id)
        if other != token.content or other_id != token.id:
            raise TokenizerError(
                f"the tokenizer's files disagree: added token {token.content!r} has the ids "
                f"{token.id} and {other_id}, id {token.id} stands for {other!r}"
            )
    return tuple(by_id.values())


def _with_placeholder(
    added: tuple[AddedToken, ...], config: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    """Add a family's placeholder of pictures where its tokenizer has none."""
    placeholder = missing_placeholder(config)
    if placeholder is None or any(token.content == placeholder[1] for token in added):
        return added
    token_id, literal = placeholder
    if taken := next((token.content for token in added if token.id == token_id), None):
        raise TokenizerError(f"config.json puts {literal} at id {token_id}, which is {taken!r}")
    return (*added, AddedToken(token_id, literal, is_special=True))


def _named_specials(config: Mapping[str, Any]) -> set[str]:
    """Return the literals that the tokenizer's config calls special."""
    listed = config.get("additional_special_tokens") or []
    listed = listed if isinstance(listed, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in listed]
    return {text for text in texts if isinstance(text, str)} | set(
        _template_variables(config).values()
    )


def _without_reserved(
    added: tuple[AddedToken, ...], ids: Collection[int]
) -> tuple[AddedToken, ...]:
    """Keep from users' hands what ends answers, stands for pictures or is spelled as a command."""

    def is_reserved(token: AddedToken) -> bool:
        is_command = _COMMAND.fullmatch(token.content) is not None
        return token.id in ids or is_command or token.content in PLACEHOLDERS

    return tuple(
        dataclasses.replace(token, is_typable=token.is_typable and not is_reserved(token))
        for token in added
    )


def _config_ids(config: Mapping[str, Any]) -> set[int]:
    """Return the ids that config.json gives a meaning: `image_token_id`, `bos_token_id`, ..."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    return {
        value
        for table in (config, *nested)
        for name, value in table.items()
        if name.endswith(("_token_id", "_token_index")) and type(value) is int
    }


def _added_token(
    entry: Mapping[str, Any], named: Collection[str], called_special: Collection[str]
) -> AddedToken:
    number, content = entry["id"], entry["content"]
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"id {number!r} is not a token id")
    if not isinstance(content, str) or not content:
        raise ValueError(f"content {content!r} is not a text")
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    is_special = bool(entry.get("special", False)) or content in named
    # Only where the model's files say that it is not special, and none says that it is.
    is_typable = entry.get("special") is False and entry.get("typable") is not False
    is_typable = is_typable and content not in called_special
    return AddedToken(number, content, is_special, is_typable=is_typable, **flags)


def _template_variables(config: Mapping[str, Any]) -> dict[str, str]:
    variables = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            variables[name] = text
    return variables


def _opening(folder: Path, definition: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return what stands before a bare text: as tokenizer.json says, else as the config does.

    Folders with sentencepiece's file alone leave it out where it is as in Llama's: yes.
    """
    if not (folder / "tokenizer.json").is_file():
        is_default = not (folder / "vocab.json").is_file()
        says = config.get("add_bos_token", is_default) is True
        return _template_variables(config).get("bos_token") if says else None
    steps = definition.get("post_processor")
    steps = steps.get("processors", [steps]) if isinstance(steps, dict) else []
    for step in steps if isinstance(steps, list) else []:
        first = step.get("single") if isinstance(step, dict) else None
        first = first[0] if isinstance(first, list) and first else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict) and isinstance(token.get("id"), str):
            return str(token["id"])
    return None


def _opening_step(files: TokenizerFiles) -> dict[str, Any] | None:
    """Return the post-processor that puts the opening in front; None where there is none."""
    number = next((t.id for t in files.added_tokens if t.content == files.opening), None)
    if number is None:
        return None
    special = {"SpecialToken": {"id": files.opening, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            files.opening: {"id": files.opening, "ids": [number], "tokens": [files.opening]}
        },
    }


def _eos_ids(config: Mapping[str, Any], name: str) -> set[int]:
    nested = config.get("text_config")
    values = [config.get("eos_token_id")]
    values.append(nested.get("eos_token_id") if isinstance(nested, dict) else None)
    ids: set[int] = set()
    for value in values:
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number >= 0:
                ids.add(number)
            elif number is not None:
                raise TokenizerError(f"{name}: eos_token_id must be token ids, got {value!r}")
    return ids


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the template: chat_template.jinja, else chat_template.json, else tokenizer_config."""
    if (folder / "chat_template.jinja").is_file():
        data = read_bytes(folder / "chat_template.jinja")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{folder / 'chat_template.jinja'} is not UTF-8") from error
    template = _read_optional(folder / "chat_template.json").get("chat_template")
    template = template if template is not None else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        entries = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = entries[-1].get("template") if entries else None
    if template is not None and not isinstance(template, str):
        raise TokenizerError("chat_template must be a text, or a list of named texts")
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
