"""Grammars: the tokens they allow, by enumeration; what they refuse, what must not harm."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.engine import grammar as grammar_module
from mgvq_runtime.engine import grammar_trial
from mgvq_runtime.engine.grammar import (
    MAX_CACHED_GRAMMARS,
    TOO_COMPLEX,
    Grammar,
    GrammarCompiler,
)
from mgvq_runtime.errors import RequestError
from mgvq_runtime.structured_outputs import StructuredOutputsParams as Form
from mgvq_runtime.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(demo_checkpoint_path())
V = TOKENIZER.vocab_size + 37  # logits are often wider than the vocabulary
COMPILER = GrammarCompiler(TOKENIZER, V)
WORDS = {i: TOKENIZER.token_bytes(i) for i in range(V) if i not in TOKENIZER.special_token_ids}


def allowed(grammar: Grammar, unwanted: tuple[int, ...] = ()) -> set[int]:
    bits = np.unpackbits(grammar.allowed(unwanted).view(np.uint8), bitorder="little")[:V]
    return set(np.flatnonzero(bits).tolist())


def by_enumeration(rests: list[bytes]) -> set[int]:
    """Every token after which one of the texts is still possible, and the end tokens."""
    tokens = {i for i, word in WORDS.items() if word and any(r.startswith(word) for r in rests)}
    return tokens | (set(TOKENIZER.eos_token_ids) if b"" in rests else set())


def walk(form: Form, language: set[bytes], data: st.DataObject) -> None:
    """Follow a random way through the language, comparing what is allowed at every step.

    Where all texts go on alike, one way to spell that is enough.
    """
    grammar, prefix = COMPILER.compile(form), b""
    for _ in range(60):
        rests = [text[len(prefix) :] for text in language if text.startswith(prefix)]
        found, expected = allowed(grammar), by_enumeration(rests)
        if os.path.commonprefix(rests):
            assert found
            assert found <= expected, prefix
        else:
            assert found == expected, prefix
        token_id = data.draw(st.sampled_from(sorted(found)))
        assert grammar.push(token_id)
        if token_id in TOKENIZER.eos_token_ids:
            assert allowed(grammar) <= TOKENIZER.eos_token_ids
            return
        prefix += WORDS[token_id]
    raise AssertionError(f"still not at the end: {prefix!r}")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=5), st.data())
def test_a_choice_allows_its_texts_alone(choice: list[str], data: st.DataObject) -> None:
    walk(Form(choice=choice), {text.encode() for text in choice}, data)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["[ab]{1,3}c?", "a*b?", "(ab|a)(bc|c)?", "a{3}", "(a|b|c)*"]), st.data())
def test_a_regex_allows_what_matches_to_the_end(pattern: str, data: st.DataObject) -> None:
    """Texts of up to five letters; longer ones are possible where the pattern is open."""
    bounded = f"{pattern}" if "*" not in pattern else pattern.replace("*", "{0,4}")
    texts = ("".join(x) for n in range(6) for x in itertools.product("abc", repeat=n))
    language = {text.encode() for text in texts if re.fullmatch(bounded, text)}
    walk(Form(regex=bounded), language, data)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Form(grammar='start: "x" n\nn: /[0-9]+/ | "(" n ")"'), ["x7", "x((42))"], ["x(1", "y"]),
        (Form(grammar='root ::= "x" n\nn ::= [0-9]+ | "(" n ")"'), ["x7", "x((42))"], ["x(1", "y"]),
        (Form(json_object=True), ["{}", '{"a": [1, 2e3], "b": {}}'], ["[]", '{"a"}', '{"a":  1}']),
        (Form(json={}), ["null", '"x"', "[1, true]"], ["nul", "[1"]),
        (Form(json_object=True, disable_any_whitespace=True), ['{"a":[1,2]}'], ['{"a": 1}']),
        (Form(json_object=True, whitespace_pattern="\n*"), ['{\n\n"a":\n1}'], ['{"a": 1}']),
        (
            Form(json={"type": "object", "properties": {"é": {"enum": ["😀", 3]}},
                       "required": ["é"], "additionalProperties": False}),
            ['{"é": "😀"}', '{ "é":3 }'],
            ["{}", '{"é": 4}', '{"é": 3, "b": 1}'],
        ),
    ],
)  # fmt: skip
def test_whole_texts_are_taken_or_not(form: Form, good: list[str], bad: list[str]) -> None:
    def takes(text: str) -> bool:
        grammar = COMPILER.compile(form)
        for token_id in TOKENIZER.encode(text):
            if token_id not in allowed(grammar) or not grammar.push(token_id):
                return False
        return bool(allowed(grammar) & TOKENIZER.eos_token_ids)

    assert all(takes(text) for text in good)
    assert not any(takes(text) for text in bad)


def test_forced_text_is_spelled_exactly() -> None:
    """U+F900 is U+8C48 in normal form C, which this tokenizer, as Qwen2's, makes of it."""
    assert TOKENIZER.decode(TOKENIZER.encode("\uf900")) == "\u8c48"
    grammar, text = COMPILER.compile(Form(choice=["x\uf900 red"])), b""
    while not (found := allowed(grammar)) & TOKENIZER.eos_token_ids:
        assert grammar.push(max(found))
        text += WORDS[max(found)]
    assert text.decode() == "x\uf900 red"


def test_special_tokens_are_no_text() -> None:
    """A form that spells "<|im_end|>" gets its letters, never the token."""
    grammar = COMPILER.compile(Form(regex=r"<\|im_end\|>.*"))
    for token_id in TOKENIZER.encode("<|im_end|>"):
        assert not allowed(grammar) & TOKENIZER.special_token_ids
        assert grammar.push(token_id)
    free = allowed(COMPILER.compile(Form(regex="(.|\n)*")))
    assert free & TOKENIZER.special_token_ids == TOKENIZER.eos_token_ids


def test_what_is_unwanted_waits_until_nothing_else_is_left() -> None:
    grammar = COMPILER.compile(Form(regex="ab?"))
    [a], [b] = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    ends = tuple(TOKENIZER.eos_token_ids)
    assert grammar.push(a)
    assert allowed(grammar) == {b, *ends}
    assert allowed(grammar, ends) == {b}
    assert grammar.push(b)
    assert allowed(grammar, ends) == set(ends)
    assert grammar.push(ends[0])
    assert grammar.push(ends[0]), "end tokens may go on where a request ignores them"


def test_a_token_outside_the_form_is_not_taken() -> None:
    grammar = COMPILER.compile(Form(regex="a+"))
    assert not grammar.push(TOKENIZER.encode("b")[0])
    assert not grammar.push(TOKENIZER.encode("a")[0]), "an error stays"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Form(regex="(a"), "unclosed group"),
        (Form(regex="(?=a)b"), "look-around"),
        (Form(grammar="start: nowhere"), 'unknown name: "nowhere"'),
        (Form(grammar="root ::= ("), "GBNF"),
        (Form(grammar="root ::= " + "(" * 10_000), "GBNF"),
        (Form(grammar="start: " + "(" * 10_000), "too deeply nested"),
        (Form(json={"type": "ghost"}), "Invalid type: ghost"),
        (Form(json={"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Form(json={"$ref": "#/$defs/nowhere"}), "does not exist"),
        (Form(json={"$ref": "https://example.org/schema"}), "not present"),
        (Form(json='{"items":' * 900 + "{}" + "}" * 900), "recursion limit"),
        (Form(json_object=True, whitespace_pattern="("), "unclosed group"),
        (Form(choice=["x" * 10**6]), "too large"),
    ],
)
def test_a_wrong_form_is_refused_by_name(form: Form, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        COMPILER.compile(form)
    assert caught.value.param == f"structured_outputs.{form.kind}"


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({}, ""),
        ({"regex": "a", "choice": ["b"]}, ""),
        ({"json_object": False}, ""),
        ({"json": "{"}, ".json"),
        ({"json": "[1]"}, ".json"),
        ({"json": [1]}, ".json"),
        ({"json": True}, ".json"),
        ({"json": {"a": float("nan")}}, ".json"),
        ({"json": {"a": object()}}, ".json"),
        ({"regex": 5}, ".regex"),
        ({"grammar": ["a"]}, ".grammar"),
        ({"json_object": "yes"}, ".json_object"),
        ({"choice": []}, ".choice"),
        ({"choice": "ab"}, ".choice"),
        ({"choice": ["a", 1]}, ".choice"),
        ({"regex": "a", "whitespace_pattern": " "}, ".whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": 3}, ".whitespace_pattern"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_at_once(
    arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Form(**arguments)
    assert caught.value.param == f"structured_outputs{param}"


def test_a_model_without_an_end_token_takes_no_form() -> None:
    class Endless:
        eos_token_ids = frozenset[int]()

    with pytest.raises(RequestError, match="no end token"):
        GrammarCompiler(Endless(), V).compile(Form(regex="a"))  # type: ignore[arg-type]


def test_equal_forms_are_compiled_once_and_do_not_share_their_state() -> None:
    compiler = GrammarCompiler(TOKENIZER, V)
    forms = [Form(json={"const": n}) for n in range(MAX_CACHED_GRAMMARS + 8)]
    with ThreadPoolExecutor(4) as pool:
        grammars = list(pool.map(compiler.compile, [*forms, *forms]))
    for n, grammar in enumerate(grammars[: len(forms)]):
        assert grammar.push(TOKENIZER.encode(str(n)[0])[0])
        fresh = compiler.compile(Form(json={"const": n}))
        assert b"".join(sorted(WORDS[i] for i in allowed(fresh)))[:1] == str(n)[0].encode()
    assert len(compiler._compiled) == MAX_CACHED_GRAMMARS


ENDLESS = "T: /.*a.{20}.*/ & ~/.*c.{18}.*/"


@pytest.mark.parametrize(
    "grammar",
    [
        f"start: T\n{ENDLESS}",
        f'start: "a" <|im_end|> T\n{ENDLESS}',  # the trial knows the names of special tokens
        f"start: <[{V - 1}]> T\n{ENDLESS}",  # and their numbers
    ],
)
def test_compiling_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, grammar: str
) -> None:
    """Here this would take all memory, and no thread can be stopped."""
    monkeypatch.setattr(grammar_trial, "CPU_S", 1)
    with pytest.raises(RequestError, match="too long or too much memory") as caught:
        COMPILER.compile(Form(grammar=grammar))
    assert (caught.value.code, caught.value.param) == (TOO_COMPLEX, "structured_outputs.grammar")


@pytest.mark.parametrize(
    ("form", "is_tried"),
    [
        (Form(regex="a(b|c)d"), True),
        (Form(json={"items": {"\u0070attern": "a+"}}), True),
        (Form(json='{"items": {"\\u0070atternProperties": {"a+": {}}}}'), True),
        (Form(json_object=True, whitespace_pattern=" {0,7}"), True),
        (Form(json={"x-guidance": {"item_separator": ", ?"}, "type": "array"}), True),
        (Form(json={"items": {"const": "no expression"}}), False),
        (Form(choice=["no", "expression"]), False),
        (Form(json_object=True), False),
    ],
)
def test_forms_with_expressions_are_tried_once(
    monkeypatch: pytest.MonkeyPatch, form: Form, is_tried: bool
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(
        grammar_module, "is_harmless", lambda text, *facts: tried.append(text) or True
    )
    compiler = GrammarCompiler(TOKENIZER, V)
    compiler.compile(form)
    assert compiler.holds(form)
    compiler._compiled.clear()  # as where many others came since
    compiler.compile(form)
    assert len(tried) == is_tried


def test_a_form_that_was_refused_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(grammar_module, "is_harmless", lambda text, *_: bool(tried.append(text)))
    monkeypatch.setattr(grammar_module, "MAX_TRIED_FORMS", 2)
    compiler = GrammarCompiler(TOKENIZER, V)
    for word in ("a", "a", "b", "c", "c", "a"):  # the third throws the first out
        with pytest.raises(RequestError, match="too long or too much memory"):
            compiler.compile(Form(regex=word))
    assert len(tried) == 4


def test_a_trial_keeps_within_limits_that_the_server_has_itself() -> None:
    program = (
        "import resource\n"
        "from mgvq_runtime.engine.grammar_trial import is_harmless\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (4, 4))\n"
        "print(is_harmless('start: \"a\"', 300, {}, [1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


def test_compiling_that_takes_too_much_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "MEMORY_BYTES", 320 << 20)  # 256 MiB of it are the stack
    assert grammar_trial.is_harmless('start: "a"', V, {}, [1])
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(16_000)) + 'r16000: "x"'
    assert not grammar_trial.is_harmless(chain, V, {}, [1])


def test_a_trial_that_fails_by_itself_is_no_fault_of_the_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not be tried"):
        COMPILER.compile(Form(regex="never seen before"))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Form(regex="(a{1000}){1000}"), "too many expressions|takes too long"),
        (Form(grammar=f'start: T\nT: "y" | "x" ({ENDLESS[3:]})'), "too many expressions"),
        (
            Form(json={"type": "object", "properties": {f"k{i}": {} for i in range(600)}}),
            "Current row has 24.. items",
        ),
    ],
)
def test_a_form_that_fails_at_its_first_tokens_is_refused(form: Form, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        COMPILER.compile(form)
    assert caught.value.code == TOO_COMPLEX
    assert "\n" not in str(caught.value)


def test_a_grammar_that_is_slow_at_every_token_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be slow far behind its beginning; all other answers wait for each of its tokens."""
    made = COMPILER.compile(Form(regex="b{9}"))
    monkeypatch.setattr(grammar_module, "SLOW_MASK_S", -1.0)
    [b] = TOKENIZER.encode("b")
    taken = 0
    while allowed(made) and made.push(b):
        taken += 1
    assert taken == grammar_module.MAX_SLOW_MASKS


CHAINS = {
    "rules": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(16_000)) + 'r16000: "x"',
    "terminals": "start: R0\n"
    + "".join(f"R{i}: R{i + 1}\n" for i in range(16_000))
    + 'R16000: "x"',
    "refs": json.dumps(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(7_000)} | {"7000": {}},
        }
    ),
}


def test_long_chains_do_not_end_the_process() -> None:
    """On a usual stack each of these is a segmentation fault, which no `except` can catch."""
    program = (
        "from tests.runtime.engine.test_grammar import CHAINS, COMPILER, Form, allowed\n"
        "for name, text in CHAINS.items():\n"
        "    form = Form(json=text) if name == 'refs' else Form(grammar=text)\n"
        "    print(name, bool(allowed(COMPILER.compile(form))))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["rules", "True", "terminals", "True", "refs", "True"]
