"""Which tokens may come next in an answer of a given form (called by `engine.logits_processor`).

`GrammarCompiler` turns `StructuredOutputsParams` into a `Grammar`, the state of one answer: it says
which tokens keep the text within the form, and is told which one was chosen. Parsing is done by
llguidance; what becomes of the logits is not known here.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import numpy.typing as npt

from mgvq_runtime.engine.grammar_trial import STACK_BYTES, is_harmless
from mgvq_runtime.errors import RequestError
from mgvq_runtime.structured_outputs import StructuredOutputsParams
from mgvq_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = "[ ]?"
"""Between the parts of JSON. Without a limit, the demonstration model writes white space to the
end; with up to 24 characters it did so at every place that allows them."""
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CACHED_GRAMMARS = 32
MAX_TRIED_FORMS = 4096
"""Digests of forms whose trial is remembered: what was thrown out of the cache costs no process
again, and what is refused no seconds."""
SLOW_MASK_S = 0.1
"""Most forms take less than a millisecond of CPU a token, `(a{600}){600}` more than this: the
engine's thread makes the masks of all answers, and each waits for the slowest."""
MAX_SLOW_MASKS = 3
"""More than these, and an answer ends with an error; a form that is warming up has one or two."""
TRIAL_TOKENS = MAX_SLOW_MASKS + 2
TOO_COMPLEX = "form_too_complex"
"""`RequestError.code` of a form that is right, and more than can be followed."""


class Grammar:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        """Start where the matcher is; nobody else uses it from now on."""
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._num_slow = 0

    @property
    def error(self) -> str:
        """What llguidance complains of since the last token, in one line; empty where nothing."""
        return self._matcher.get_error().partition("\n")[0]

    def allowed(self, unwanted: Collection[int] = ()) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, one bit each.

        An answer that can only end has its end tokens here.

        Args:
            unwanted: Tokens to leave out, unless nothing else would be left.

        Returns:
            `[ceil(V / 32)]` int32: bit k of word i is token `32 * i + k`.
        """
        start_s = time.thread_time()  # CPU of this thread: what else the machine does is no fault
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]
        self._num_slow += time.thread_time() - start_s > SLOW_MASK_S
        wanted = words.copy()
        for token_id in unwanted:
            wanted[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        return (wanted if wanted.any() else words).view(np.int32)

    def push(self, token_id: int) -> bool:
        """Take the token that was chosen; return False if the grammar cannot be followed on.

        A grammar that is too slow cannot be followed either.
        """
        if self._num_slow > MAX_SLOW_MASKS:
            return False
        if self._matcher.is_stopped():  # after the end, or after an error
            return not self._matcher.is_error()
        return self._matcher.consume_token(token_id)


class GrammarCompiler:
    """Makes grammars for one tokenizer; may be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Note the tokenizer; nothing is built before the first grammar.

        Args:
            tokenizer: The model's.
            vocab_size: Width of the model's logits, which may be padded.
        """
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._ll_tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, llguidance.LLMatcher] = OrderedDict()
        self._tried: OrderedDict[bytes, bool] = OrderedDict()

    def holds(self, params: StructuredOutputsParams) -> bool:
        """Return whether a form is compiled already: `compile` takes no time then."""
        with self._lock:
            return params in self._compiled

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Return a grammar at its beginning; what was asked before costs only a copy.

        A new form with expressions is compiled by a process that may be killed, and then here.

        Raises:
            RequestError: if the schema, regex or grammar is wrong, too large or too complex
                (`.code` is `TOO_COMPLEX`), or the model has no end token; `.param` names the field.
        """
        with self._lock:
            matcher = self._compiled.get(params)
        if matcher is None:
            matcher = self._compile(params)
        with self._lock:
            self._compiled[params] = matcher
            self._compiled.move_to_end(params)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return Grammar(matcher.deep_copy(), self.vocab_size)

    def _compile(self, params: StructuredOutputsParams) -> llguidance.LLMatcher:
        param = f"structured_outputs.{params.kind}"
        if not self.tokenizer.eos_token_ids:
            raise RequestError("this model has no end token to end a given form", param=param)
        try:
            text = _to_llguidance(params)
        except ValueError as error:
            raise RequestError(f"{params.kind}: {error}", param=param) from None
        if len(text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"{params.kind} is too large: {len(text)} characters, at most {MAX_GRAMMAR_CHARS}",
                param=param,
            )
        if _has_expressions(params) and not self._is_harmless(text):
            raise _too_complex(params.kind, "it takes too long or too much memory to compile")
        made: list[tuple[llguidance.LLMatcher, bool]] = []
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _ll_tokenizer(self.tokenizer, self.vocab_size)
            usual = threading.stack_size(STACK_BYTES)
            arguments = (self._ll_tokenizer, text, made)
            thread = threading.Thread(target=_make, args=arguments, daemon=True)
            thread.start()
            threading.stack_size(usual)
        thread.join()
        matcher, is_wrong = made[0]
        if is_wrong:
            raise RequestError(f"{params.kind}: {matcher.get_error()}", param=param)
        self._check_first_tokens(matcher, params.kind)
        return matcher

    def _is_harmless(self, text: str) -> bool:
        """Try a form in a process of its own, unless that was done before."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            known = self._tried.get(digest)
        if known is not None:
            return known
        tokenizer, size = self.tokenizer, self.vocab_size
        ids = tokenizer.special_token_ids | tokenizer.eos_token_ids
        special = {i: tokenizer.token_bytes(i) for i in ids if i < size}
        found = is_harmless(text, size, special, tokenizer.eos_token_ids)
        with self._lock:
            self._tried[digest] = found
            if len(self._tried) > MAX_TRIED_FORMS:
                self._tried.popitem(last=False)
        return found

    def _check_first_tokens(self, matcher: llguidance.LLMatcher, kind: str) -> None:
        """Begin an answer: some forms that compile fail at their first token, or crawl."""
        grammar = Grammar(matcher.deep_copy(), self.vocab_size)
        ends = self.tokenizer.eos_token_ids
        for _ in range(TRIAL_TOKENS):
            bits = np.unpackbits(grammar.allowed(ends).view(np.uint8), bitorder="little")
            token_id = int(bits.argmax())
            if not grammar.push(token_id):
                raise _too_complex(kind, grammar.error or "a token takes too long")
            if token_id in ends:
                return


def _too_complex(kind: str, why: str) -> RequestError:
    return RequestError(
        f"{kind} is too complex to follow: {why}; simplify it, its repetitions, optional "
        "properties and `&` with `~` first",
        param=f"structured_outputs.{kind}",
        code=TOO_COMPLEX,
    )


def _make(
    tokenizer: llguidance.LLTokenizer, text: str, made: list[tuple[llguidance.LLMatcher, bool]]
) -> None:
    """Append the matcher of a grammar and whether it is wrong (in a thread with a large stack)."""
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    is_wrong = matcher.is_error()
    if not is_wrong:
        matcher.compute_bitmask()  # the first is the slowest; copies have it
    made.append((matcher, is_wrong))


def _has_expressions(params: StructuredOutputsParams) -> bool:
    """Whether a client has written patterns: nothing else takes llguidance without end.

    `_schema_text` has written the schema: `"pattern`, `"patternProperties` and `"x-guidance`, whose
    separators are patterns too, have no escapes.
    """
    if params.regex is not None or params.grammar is not None:
        return True
    schema = str(params.json)
    is_in_schema = '"pattern' in schema or '"x-guidance' in schema
    return is_in_schema or params.whitespace_pattern is not None


def _to_llguidance(params: StructuredOutputsParams) -> str:
    """Write a form in llguidance's own language.

    Raises:
        ValueError: if it is GBNF and cannot be read.
    """
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return llguidance.grammar_from("choice", json.dumps(params.choice))
    if params.grammar is not None:
        if "::=" in params.grammar:
            return llguidance.grammar_from("gbnf", params.grammar)
        return llguidance.LLMatcher.grammar_from_lark(params.grammar)
    schema = '{"type": "object"}' if params.json is None else params.json
    assert isinstance(schema, str), "StructuredOutputsParams keeps schemas as text"
    options: JsonCompileOptions = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    return llguidance.LLMatcher.grammar_from_json_schema(schema, options)


class _Vocabulary:
    """A tokenizer as `llguidance.TokenizerWrapper` wants to see one.

    Where a form leaves no choice of text, llguidance asks for its tokens and allows the first one.
    They must spell exactly that text: a tokenizer that normalizes Unicode or puts a space in front
    would lead the answer out of its form.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.special_token_ids if i < vocab_size)
        self._encode = tokenizer.encode
        special = set(self.special_token_ids)
        self._id_of = {w: i for i, w in enumerate(self.tokens) if w and i not in special}
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: str) -> list[int]:
        ids, data = self._encode(text), text.encode()
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        return self._longest_words(data)

    def _longest_words(self, data: bytes) -> list[int]:
        """Spell bytes by the longest word that fits, again and again, as far as words go."""
        ids, start = [], 0
        while start < len(data):
            ends = range(min(start + self._longest, len(data)), start, -1)
            end = next((end for end in ends if data[start:end] in self._id_of), None)
            if end is None:
                break
            ids.append(self._id_of[data[start:end]])
            start = end
        return ids


def _ll_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    return llguidance.LLTokenizer(wrapper, vocab_size, sorted(tokenizer.eos_token_ids))
