"""Text and conversations to token ids, and ids to bytes (called by multimodal, engine and llm).

Byte-pair tokenizers, byte-level (Qwen2, Llama 3) or of sentencepiece (Llama 2, Phi-3, InternLM2).
What a user writes can never become a special token: the model's merges run in a
`tokenizers.Tokenizer` that has no added tokens at all, and a literal counts as special only where
the chat template itself wrote it. Added tokens that steer nothing, such as "<think>", users may
write. For ordinary text the ids are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mgvq_runtime.errors import RequestError, TokenizerError
from mgvq_runtime.tokenizer.chat_template import QWEN2_VL_TEMPLATE, ChatTemplate, check_size
from mgvq_runtime.tokenizer.folder import AddedToken, TokenizerFiles, read_tokenizer_files
from mgvq_runtime.tokenizer.literals import Literals
from mgvq_runtime.tokenizer.pieces import Alphabet

PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points without a meaning: stand-ins for the ends of special tokens in users' text."""


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(
        self, files: TokenizerFiles, default_template: str | None = QWEN2_VL_TEMPLATE
    ) -> None:
        """Make a tokenizer from its files' contents; `from_folder` reads them.

        Args:
            files: what the folder says.
            default_template: as `from_folder`.

        Raises:
            TokenizerError: if it is of a kind that is not supported, or cannot be built.
        """
        self.added_tokens: Mapping[str, int] = {t.content: t.id for t in files.added_tokens}
        """Ids of all special and added tokens by their literal text."""
        self.special_token_ids = frozenset(t.id for t in files.added_tokens if t.is_special)
        self.eos_token_ids = files.eos_token_ids
        """Ids that end an answer, from every file that names one."""
        opening = self.added_tokens.get(files.opening or "")
        self.opening_ids = () if opening is None else (opening,)
        """Ids that begin a text which no chat template has written."""
        self._alphabet = Alphabet.of(files.definition)
        self._plain, vocab = _build_plain(files.definition, self.added_tokens)
        self._inner = self._plain
        """For text behind a special token, where no space is put in front."""
        if (without_prefix := _without_first_prefix(files.definition)) is not None:
            self._inner, _ = _build_plain(without_prefix, self.added_tokens)
        self._words = {number: word for word, number in vocab.items()}
        self._added_bytes = {t.id: t.content.encode() for t in files.added_tokens}
        tokens = {t.content: t for t in files.added_tokens}
        self._literals = Literals(tokens)
        self._typable = Literals({text: t for text, t in tokens.items() if t.is_typable})
        source = files.chat_template or default_template
        self._template = None if source is None else ChatTemplate(source, files.template_variables)
        self._mask = _stand_ins(tokens.values(), source or "")
        masked = {text.translate(self._mask): t for text, t in tokens.items() if t.is_typable}
        self._rendered_literals = Literals(tokens | masked)
        self._masked_template = self._template
        self._exchanged = _apart_from_specials(tokens.values())
        if source is not None and any(text in source for text in self._exchanged):
            self._masked_template = ChatTemplate(source, files.template_variables, self._masked)
        self.vocab_size = 1 + max([*self._words, *self._added_bytes], default=-1)
        """One more than the largest id."""

    @classmethod
    def from_folder(
        cls, path: str | Path, default_template: str | None = QWEN2_VL_TEMPLATE
    ) -> Tokenizer:
        """Read a checkpoint's tokenizer: `tokenizer.json`, or the older files it replaces.

        Args:
            path: a checkpoint folder, quantized or not.
            default_template: the chat template where the folder has none; None leaves the model
                without one, and conversations are refused.

        Raises:
            TokenizerError: if the files are missing, malformed, or of a kind that is not supported.
        """
        try:
            return cls(read_tokenizer_files(Path(path).expanduser()), default_template)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Turn text into ids.

        Args:
            text: any text; nothing is added in front or behind.
            allow_special: whether literals such as "<|im_end|>" become special ids. Leave it off
                for everything a user wrote.

        Raises:
            RequestError: if the text has lone surrogates, which no encoding can write, or the
                tokenizer gives up on it.
        """
        return self._encode(text, self._literals if allow_special else self._typable)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the text the model was trained on; see `ChatTemplate.render`."""
        return self._chat_template().render(messages, add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Turn a conversation into ids; special ids come from the template alone.

        Args:
            messages: `{"role", "content": str | [{"type": "text", "text": ...} | {"type":
                "image" | "video"}]}`; an image or a video becomes one placeholder, to be expanded
                later. An image with `is_frame` is one of a video.
            add_generation_prompt: whether the assistant's turn is opened at the end.

        Raises:
            RequestError: if the template refuses the conversation, text has lone surrogates, or
                the tokenizer gives up on it.
            TokenizerError: if the template fails.
        """
        template = self._chat_template(is_masked=True)
        check_size(messages)
        mask = self._mask_for(messages, template)
        rendered = template.render(
            [_mask_message(message, mask) for message in messages], add_generation_prompt
        )
        unmask = {point: c for c, point in mask.items()}
        return self._encode(rendered, self._rendered_literals, unmask)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into text; bytes that are no character become U+FFFD, unknown ids nothing."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(number) for number in ids if number not in skipped)
        return data.removeprefix(self.leading_space).decode("utf-8", "replace")

    @property
    def leading_space(self) -> bytes:
        """What a text loses in front when it is decoded, b"" for most tokenizers."""
        return b" " if self._alphabet.strips_space else b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; b"" for an id that has none (padded vocabulary)."""
        if (added := self._added_bytes.get(token_id)) is not None:
            return added
        return self._alphabet.bytes_of(self._words.get(token_id, ""))

    def special_id(self, name: str) -> int:
        """Return the id of a special token by its literal, or by the word inside: "image_pad".

        Raises:
            TokenizerError: if there is none; the message lists those there are.
        """
        for literal in (name, f"<|{name}|>", f"<{name}>"):
            if literal in self.added_tokens:
                return self.added_tokens[literal]
        known = ", ".join(self.added_tokens) or "none"
        raise TokenizerError(f"there is no special token {name!r}; there are: {known}")

    def _encode(
        self, text: str, literals: Literals, unmask: Mapping[int, int] | None = None
    ) -> list[int]:
        """Encode text whose `literals` are tokens; `unmask` undoes the stand-ins between."""
        ids: list[int] = []
        is_first = True
        for plain, token in literals.split(text):
            ids += self._plain_ids(plain.translate(unmask) if unmask else plain, is_first)
            if token is not None:
                ids.append(token.id)
                is_first = False
        return ids

    def _plain_ids(self, text: str, is_first: bool = True) -> list[int]:
        """Encode text without special tokens; `is_first` where none comes before it."""
        if not text:
            return []
        tokenizer = self._plain if is_first else self._inner
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("the text has a lone surrogate; send valid Unicode") from error
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # Rust's panics are no Exception
            raise RequestError(
                f"the tokenizer gives up on a text of {len(text)} characters: "
                f"{str(error)[:200]}; send less, or something else"
            ) from error

    def _chat_template(self, is_masked: bool = False) -> ChatTemplate:
        template = self._masked_template if is_masked else self._template
        if template is None:
            raise RequestError(
                "this model has no chat template, so it continues texts but holds no conversation",
                param="messages",
            )
        return template

    def _masked(self, text: str) -> str:
        """Write tokens in a template's text as they look in what users wrote.

        So a template that looks for "</think>" finds it there. No end of a special token is added.
        """
        mask, exchanged = self._mask, self._exchanged
        return self._literals.exchange(
            text, lambda t: t.content.translate(mask) if t.content in exchanged else t.content
        )

    def _mask_for(
        self, messages: Sequence[Mapping[str, Any]], template: ChatTemplate
    ) -> dict[int, int]:
        """Return what is exchanged in users' text; the way back is exact.

        Where users wrote stand-ins, these are exchanged too, for characters that nobody wrote.
        """
        written = set().union(*_texts(messages))
        points = self._mask.values()
        taken = written.union(template.source, map(chr, points))
        free = (point for point in PRIVATE_USE if chr(point) not in taken)
        clashes = [point for point in points if chr(point) in written]
        return self._mask | dict(zip(clashes, free, strict=False))


def _stand_ins(tokens: Iterable[AddedToken], source: str) -> dict[int, int]:
    """Map the first and last characters of special tokens to characters that mean nothing.

    With both ends of every literal exchanged in users' text, a literal in the rendered text was
    begun and ended by the template, even where texts meet.
    """
    literals = [token.content for token in tokens if not token.is_typable]
    ends = {c for literal in literals for c in (literal[0], literal[-1]) if not c.isspace()}
    free = (point for point in PRIVATE_USE if chr(point) not in source)
    return {ord(c): point for c, point in zip(sorted(ends), free, strict=False)}


def _apart_from_specials(tokens: Collection[AddedToken]) -> frozenset[str]:
    """Return the literals users may write that have no end in common with a special one.

    The others stay as they are in a template, which may write a special token piece by piece.
    """
    special = [token.content for token in tokens if not token.is_typable]
    begins = {text[:k] for text in special for k in range(1, len(text) + 1)}
    ends = {text[k:] for text in special for k in range(len(text))}
    inside = "\0".join(special)
    return frozenset(
        text
        for text in (token.content for token in tokens if token.is_typable)
        if text not in inside
        and not any(text[:k] in ends or text[k:] in begins for k in range(1, len(text)))
    )


def _mask_message(message: Mapping[str, Any], mask: Mapping[int, int]) -> dict[str, Any]:
    """Exchange characters in the texts of a message whose shape `_texts` has checked."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        masked: Any = content.translate(mask)
    else:  # only what is checked is passed on: a template may look at any other key
        masked = [
            {"type": "text", "text": part["text"].translate(mask)}
            if part["type"] == "text"
            else {"type": part["type"], "is_frame": part.get("is_frame") is True}
            for part in content
        ]
    return {"role": role if role.isidentifier() else role.translate(mask), "content": masked}


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield every text of the messages, checking their shape on the way."""
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | list | tuple):
            raise RequestError(
                f"messages[{i}] needs a role and a content, a string or a list of parts",
                param=f"messages[{i}]",
            )
        yield role
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for k, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("image", "video") and (
                kind != "text" or not isinstance(part.get("text"), str)
            ):
                raise RequestError(
                    f"messages[{i}].content[{k}] must be a text with its text, an image or a video",
                    param=f"messages[{i}].content[{k}]",
                )
            if kind == "text":
                yield part["text"]


def _without_first_prefix(definition: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the definition for text that is not the first; None where it is the same."""
    step = definition.get("pre_tokenizer")
    if isinstance(step, dict) and step.get("prepend_scheme") == "first":
        return {**definition, "pre_tokenizer": {**step, "prepend_scheme": "never"}}
    return None


def _build_plain(
    definition: Mapping[str, Any], added: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Build the tokenizer without added tokens, and return its vocabulary too."""
    model = dict(definition["model"])
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(n) is int and n >= 0 for n in vocab.values()):
        raise TokenizerError("its vocabulary must be an object of tokens and ids")
    if model.get("byte_fallback"):
        model["unk_token"] = None  # every character has bytes, so nothing is unknown
    special = {word for word in added if not word.isspace()}
    hidden = special - {model.get("unk_token")}
    model["vocab"] = vocab = {word: n for word, n in vocab.items() if word not in hidden}
    merges = model.get("merges")
    if isinstance(merges, list):  # some files spell special tokens by merges
        model["merges"] = [pair for pair in merges if _joined(pair) not in special]
    plain = {**definition, "model": model, "added_tokens": [], "truncation": None, "padding": None}
    plain["post_processor"] = None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain)), vocab
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        raise TokenizerError(f"its tokenizer cannot be built: {error}") from error


def _joined(pair: Any) -> str:
    """Return what a merge makes; it is written as a list of two words, or as "left right"."""
    if isinstance(pair, str):
        return pair.replace(" ", "", 1)
    return "".join(map(str, pair)) if isinstance(pair, list) else ""
