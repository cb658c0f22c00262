"""Chat completions as openai's own client sees them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from openai.types import CompletionUsage

from mgvq_runtime import FinishReason, RequestOutput
from mgvq_runtime import StructuredOutputsParams as Form
from mgvq_serve.protocol import usage_body
from tests.serve.conftest import MODEL, RunningServer, ask, data_url, image_part
from tests.serve.fake_engine import MAX_MODEL_LEN, TOKENS_PER_IMAGE


def test_answer_has_the_shape_of_openai(client) -> None:
    reply = client.chat.completions.create(**ask("hello big world"))
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == MODEL
    assert reply.system_fingerprint.startswith("b")
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "hello big world")
    assert choice.logprobs is None
    assert choice.message.tool_calls is None
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 3, 7)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_prompt_tokens_include_those_of_pictures(server: RunningServer, client) -> None:
    content = [
        image_part(data_url((40, 30))),
        {"type": "text", "text": "what is this"},
        image_part(data_url((64, 20), "JPEG"), detail="high"),
    ]
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}]
    )
    assert reply.choices[0].message.content == "what is this"
    assert reply.usage.prompt_tokens == 4 + 2 * TOKENS_PER_IMAGE
    assert server.engine.chat_processor.image_sizes == [(40, 30), (64, 20)]


def test_low_detail_scales_the_picture_down(server: RunningServer, client) -> None:
    content = [image_part(data_url((1024, 256)), detail="low"), {"type": "text", "text": "x"}]
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert server.engine.chat_processor.image_sizes == [(512, 128)]


def test_a_conversation_with_all_roles(client) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "second"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages)
    assert reply.choices[0].message.content == "second"


def test_stream_adds_up_to_the_answer(client) -> None:
    chunks = list(client.chat.completions.create(**ask("a b c"), stream=True))
    assert {(c.id, c.created, c.model) for c in chunks} == {
        (chunks[0].id, chunks[0].created, MODEL)
    }
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert (last.delta.content, last.finish_reason) == (None, "stop")
    middle = [c.choices[0].delta for c in chunks[1:-1]]
    assert all(delta.content and delta.role is None for delta in middle)
    assert "".join(delta.content for delta in middle) == "a b c"
    assert all(chunk.usage is None for chunk in chunks)


def test_guessed_tokens_are_counted_where_openai_counts_them() -> None:
    plain = RequestOutput("a", "", (), None, FinishReason.STOP, 5, 7, 3)
    usage = CompletionUsage.model_validate(usage_body([plain, plain]))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 14, 19)
    assert usage.completion_tokens_details is None
    guessed = replace(plain, num_draft_tokens=6, num_accepted_tokens=4)
    usage = CompletionUsage.model_validate(usage_body([plain, guessed]))
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens == 4
    assert usage.completion_tokens_details.rejected_prediction_tokens == 2


def test_cached_is_what_no_answer_had_to_compute() -> None:
    first = RequestOutput("a", "", (), None, FinishReason.STOP, 80, 2, 0)
    second = replace(first, request_id="b", num_cached_tokens=64)
    assert usage_body([first, second])["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage_body([second, second])["prompt_tokens_details"] == {"cached_tokens": 64}


def test_stream_usage_only_when_asked(client) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**ask("a b"), stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length_limits(client, field: str) -> None:
    reply = client.chat.completions.create(**ask("count"), **{field: 3})
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("1 2 3", "length")
    assert reply.usage.completion_tokens == 3


def test_without_limits_the_context_is_the_limit(server: RunningServer, client) -> None:
    for fields in ({}, {"max_tokens": 10**6}):
        reply = client.chat.completions.create(**ask("count"), **fields)
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.total_tokens == MAX_MODEL_LEN


@pytest.mark.parametrize("stop", ["4", ["nothing", "4"]])
def test_stop_strings(client, stop) -> None:
    reply = client.chat.completions.create(**ask("count"), stop=stop)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("1 2 3", "stop")


def test_sampling_fields_reach_the_engine(server: RunningServer, client) -> None:
    more = {"top_k": 7, "min_p": 0.25, "ignore_eos": True, "stop_token_ids": [3, 4]}
    client.chat.completions.create(
        **ask("x"), temperature=0.5, top_p=0.75, seed=-11, extra_body=more
    )
    params = server.engine.requests[-1].sampling_params
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.75, -11)
    assert (params.top_k, params.min_p) == (7, 0.25)
    assert (params.ignore_eos, params.stop_token_ids) == (True, (3, 4))


def test_what_changes_logits_reaches_the_engine(server: RunningServer, client) -> None:
    more = {"repetition_penalty": 1.2, "min_tokens": 2, "include_stop_str_in_output": True}
    client.chat.completions.create(
        **ask("x"),
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"5": -100, "17": 2.5},
        extra_body=more,
    )
    params = server.engine.requests[-1].sampling_params
    assert (params.frequency_penalty, params.presence_penalty) == (0.5, -1)
    assert params.logit_bias == {5: -100, 17: 2.5}
    assert (params.repetition_penalty, params.min_tokens) == (1.2, 2)
    assert params.include_stop_str_in_output


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMS = [
    ({"response_format": {"type": "json_object"}}, Form(json_object=True)),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
            }
        },
        Form(json=SCHEMA),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Form(json=SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, Form(json_object=True)),
    (
        {"structured_outputs": {"json": "{}", "whitespace_pattern": " *"}},
        Form(json={}, whitespace_pattern=" *"),
    ),
    (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        Form(json={}, disable_any_whitespace=True),
    ),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Form(choice=["a", "b"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Form(grammar='start: "a"')),
    ({"guided_json": SCHEMA}, Form(json=SCHEMA)),
    (
        {"guided_json": {}, "guided_whitespace_pattern": "x"},
        Form(json={}, whitespace_pattern="x"),
    ),
    ({"guided_regex": "a+"}, Form(regex="a+")),
    ({"guided_choice": ["a"], "guided_decoding_backend": "auto"}, Form(choice=["a"])),
    ({"guided_grammar": 'root ::= "a"'}, Form(grammar='root ::= "a"')),
    ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
]


@pytest.mark.parametrize(("fields", "form"), FORMS)
def test_every_way_to_ask_for_a_form_reaches_the_engine(
    server: RunningServer, client, fields, form
) -> None:
    client.chat.completions.create(**ask("x"), extra_body=fields)
    assert server.engine.requests[-1].sampling_params.structured_outputs == form


def test_who_shares_who_goes_first_and_for_how_long_reach_the_engine(
    server: RunningServer, serve, client
) -> None:
    client.chat.completions.create(**ask("x"))
    request = server.engine.requests[-1]
    assert (request.cache_salt, request.priority, request.timeout_s) == (None, 0, 600)
    client.chat.completions.create(**ask("x"), extra_body={"cache_salt": "me", "priority": -3})
    request = server.engine.requests[-1]
    assert (request.cache_salt, request.priority) == ("me", -3)
    patient = serve(request_timeout=0)
    assert patient.post(ask("x")).status_code == 200
    assert patient.engine.requests[-1].timeout_s is None


def test_several_answers_have_seeds_of_their_own(server: RunningServer, client) -> None:
    reply = client.chat.completions.create(**ask("a b"), n=3, seed=2**63 - 1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == ["a b"] * 3
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 6)
    seeds = [request.sampling_params.seed for request in server.engine.requests[-3:]]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]


def test_answers_without_a_seed_share_their_parameters(server: RunningServer, client) -> None:
    """Long lists are checked once a request, not once an answer."""
    client.chat.completions.create(**ask("a b"), n=3, logit_bias={str(i): 1 for i in range(4096)})
    assert len({id(request.sampling_params) for request in server.engine.requests[-3:]}) == 1


def test_several_answers_in_one_stream(client) -> None:
    texts, finishes = {0: "", 1: ""}, {}
    for chunk in client.chat.completions.create(**ask("a b c"), n=2, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            assert choice.index not in finishes
            finishes[choice.index] = choice.finish_reason
    assert texts == {0: "a b c", 1: "a b c"}
    assert finishes == {0: "stop", 1: "stop"}


def test_logprobs(client) -> None:
    reply = client.chat.completions.create(
        **ask("a b"), logprobs=True, top_logprobs=2, max_tokens=2
    )
    entries = reply.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["a", " b"]
    assert bytes(entries[1].bytes) == b" b"
    assert [other.token for other in entries[0].top_logprobs] == ["other0", "other1"]
    assert entries[0].top_logprobs[0].logprob == -9999.0  # JSON has no minus infinity


def test_logprobs_in_a_stream_are_complete(client) -> None:
    tokens = []
    for chunk in client.chat.completions.create(**ask("a b c"), logprobs=True, stream=True):
        if chunk.choices[0].logprobs is not None:
            tokens += [entry.token for entry in chunk.choices[0].logprobs.content]
    assert tokens == ["a", " b", " c", ""]  # the end token too, with the last chunk


def test_neutral_and_unknown_fields_change_nothing(client) -> None:
    more = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
        "parallel_tool_calls": True, "metadata": {"a": "b"}, "nobody_knows_this": [1],
        "logprobs": None, "stream": None, "n": None, "stop": None, "stream_options": None,
    }  # fmt: skip
    reply = client.chat.completions.create(**ask("hello"), extra_body=more)
    assert reply.choices[0].message.content == "hello"


def test_async_client_and_eight_at_once(server: RunningServer) -> None:
    async def one(client, i: int) -> str:
        stream = await client.chat.completions.create(**ask(f"I am number {i}"), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, i) for i in range(8)))

    assert asyncio.run(all_of_them()) == [f"I am number {i}" for i in range(8)]


def test_only_the_engine_thread_touches_the_engine(server: RunningServer, client) -> None:
    client.chat.completions.create(**ask("hello"))
    assert server.engine.threads == {"mgvq-engine"}
