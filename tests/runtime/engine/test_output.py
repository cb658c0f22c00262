"""Text that can no longer change: stop strings across tokens, end tokens, what is held back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.request import FinishReason, SamplingParams

EOS = 0


class Letters:
    """A detokenizer whose token n is the n-th word of a list."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def push(self, token_id: int) -> str:
        return self.words[token_id]

    def flush(self) -> str:
        return ""


def run(words: list[str], max_tokens: int = 100, **params: object) -> tuple[list[str], str]:
    """Feed the words as tokens 1, 2, ...; an empty word is the end token."""
    output = OutputText(
        Letters(["", *words]), SamplingParams(**params), frozenset([EOS]), max_tokens
    )
    pieces = []
    for index, word in enumerate(words, start=1):
        text, reason = output.push(index if word else EOS)
        pieces.append(text)
        if reason is not None:
            return pieces, reason.value
    return [*pieces, output.flush()], "abort"


def test_text_flows_and_the_end_token_is_silent() -> None:
    assert run(["a", "b", "", "c"]) == (["a", "b", ""], "stop")
    assert run(["a", "b", "c"], max_tokens=2) == (["a", "b"], "length")


def test_ignore_eos_goes_on_without_its_text() -> None:
    pieces, reason = run(["a", "", "b"], ignore_eos=True, max_tokens=3)
    assert ("".join(pieces), reason) == ("ab", "length")


def test_stop_token_ids_end_the_answer() -> None:
    assert run(["a", "b", "c"], stop_token_ids=(2,)) == (["a", ""], "stop")


def test_a_stop_string_over_tokens_is_held_back_and_cut() -> None:
    pieces, reason = run(["one E", "N", "D two"], stop=("END",))
    assert (pieces, reason) == (["one ", "", ""], "stop")


def test_what_only_looked_like_a_stop_string_is_released() -> None:
    pieces, reason = run(["x E", "N", "E", ""], stop=("END",))
    assert pieces == ["x ", "", "EN", "E"]
    assert reason == "stop"


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    pieces, reason = run(["hello world"], stop=("world", "lo"))
    assert (pieces, reason) == (["hel"], "stop")


def test_what_stopped_an_answer_can_be_kept() -> None:
    keep = {"include_stop_str_in_output": True}
    assert run(["one E", "ND two"], stop=("END",), **keep) == (["one ", "END"], "stop")
    assert run(["xaab"], stop=("ab", "a", "aa"), **keep) == (["xa"], "stop")
    assert run(["a", "b", "c"], stop_token_ids=(2,), **keep) == (["a", "b"], "stop")
    assert run(["a", "", "c"], **keep) == (["a", ""], "stop")  # the model's own end has no text


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    assert run(["no", "no", "x", "no", "y"], stop=("no",), min_tokens=2) == (
        ["no", "no", "x", ""],
        "stop",
    )
    assert run(["a n", "o", "b"], stop=("no",), min_tokens=1) == (["a ", ""], "stop")


def test_length_and_abort_release_what_was_held() -> None:
    assert run(["ab E"], stop=("END",), max_tokens=1) == (["ab E"], "length")
    assert run(["ab E"], stop=("END",)) == (["ab ", "E"], "abort")


def test_a_character_still_incomplete_at_the_end_is_flushed() -> None:
    class Half(Letters):
        def flush(self) -> str:
            return "\ufffd"

    output = OutputText(Half(["", "a"]), SamplingParams(), frozenset([EOS]), 1)
    assert output.push(1) == ("a\ufffd", FinishReason.LENGTH)


@settings(deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_released_text_is_the_text_before_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """However it is cut into tokens: it ends before a match of the first token that has one."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8)))
    edges = [0, *[c for c in cuts if c < len(text)], len(text)]
    words = [text[a:b] for a, b in zip(edges, edges[1:], strict=False) if a < b]
    pieces, reason = run(words, stop=tuple(stops))
    seen = ""
    expected = text
    for word in words:
        seen += word
        starts = [seen.find(stop) for stop in stops if stop in seen]
        if starts:
            expected = seen[: min(starts)]
            break
    assert "".join(pieces) == expected
    assert (reason == "stop") == (expected != text or any(stop in text for stop in stops))


@pytest.mark.parametrize("stop", ["", 3])
def test_a_stop_that_is_no_string_is_refused(stop: object) -> None:
    with pytest.raises(ValueError, match="stop must hold strings"):
        SamplingParams(stop=(stop,))
