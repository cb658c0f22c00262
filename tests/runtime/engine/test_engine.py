"""The whole engine on a tiny model: against transformers, alone and together, and under faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.errors import ContextLengthError, EngineDeadError, RequestError
from mgvq_runtime.request import FinishReason, Prompt, Request, SamplingParams
from tests.runtime.engine.engine_runs import (
    GREEDY,
    finish,
    picture,
    prompt,
    prompts,
    run,
    tokens,
)

MakeEngine = Callable[..., Engine]


def texts(outputs: dict[str, list[Any]]) -> dict[str, str]:
    return {key: "".join(one.text for one in each) for key, each in outputs.items()}


def test_greedy_tokens_are_those_of_transformers(
    make_engine: MakeEngine, tiny_qwen2_vl_folder: Path
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    reference = Qwen2VLForConditionalGeneration.from_pretrained(
        tiny_qwen2_vl_folder, dtype=torch.float32
    ).eval()
    engine = make_engine()
    asked = prompts(engine)
    found = run(engine, asked)
    image_token_id = engine.model_config.image_token_id
    for index, one in enumerate(asked):
        ids = torch.tensor([one.token_ids])
        pictures = {}
        if one.images:
            patches = np.concatenate([image.patches for image in one.images])
            pictures = {
                "pixel_values": torch.from_numpy(patches),
                "image_grid_thw": torch.tensor([image.grid_thw for image in one.images]),
            }
        with torch.no_grad():
            expected = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == image_token_id).int(),
                max_new_tokens=GREEDY.max_tokens,
                min_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                eos_token_id=-1,
                **pictures,
            )
        assert tokens(found[str(index)]) == expected[0, ids.shape[1] :].tolist(), index


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_seqs": 1},
        {"max_batch_tokens": 16},
        {"max_batch_tokens": 64},
        {"block_size": 5, "num_kv_blocks": 120},
        {"block_size": 2, "num_kv_blocks": 92},
    ],
    ids=["alone", "chunks of 16", "chunks of 64", "odd blocks", "small pool"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_what_else_runs(
    make_engine: MakeEngine, changes: dict[str, int], temperature: float
) -> None:
    """Alone or in a batch of eight, in chunks that end inside pictures, and after preemption."""
    together, other = make_engine(), make_engine(**changes)
    params = [replace(GREEDY, temperature=temperature, seed=index) for index in range(8)]
    expected = run(together, prompts(together), params)
    found = run(other, prompts(other), params)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    assert texts(found) == texts(expected)
    assert (other.num_preemptions > 0) == (changes.get("block_size") == 2)


def test_requests_without_a_seed_differ_and_engines_with_the_same_seed_agree(
    make_engine: MakeEngine,
) -> None:
    params = SamplingParams(temperature=3.0, max_tokens=8, ignore_eos=True)
    runs = []
    for _ in range(2):
        engine = make_engine(seed=5)
        runs.append(run(engine, [prompt(engine, "Describe it.")] * 3, params))
    answers = [tokens(each) for each in runs[0].values()]
    assert len(set(map(tuple, answers))) == 3
    assert answers == [tokens(each) for each in runs[1].values()]


def test_outputs_count_and_end_as_they_say(make_engine: MakeEngine) -> None:
    engine = make_engine()
    asked = prompts(engine)[:3]
    found = run(engine, asked, replace(GREEDY, logprobs=2))
    for index, one in enumerate(asked):
        outputs = found[str(index)]
        assert [o.num_completion_tokens for o in outputs] == list(range(1, 13))
        assert {o.num_prompt_tokens for o in outputs} == {len(one.token_ids)}
        assert [o.finish_reason for o in outputs] == [None] * 11 + [FinishReason.LENGTH]
        for output in outputs:
            assert output.logprobs is not None
            (entry,) = output.logprobs
            assert (entry.token_id,) == output.token_ids
            assert entry.top[0].logprob == entry.logprob <= 0.0
            assert entry.top[0].logprob >= entry.top[1].logprob
        special = engine.tokenizer.special_token_ids
        raw = b"".join(o.logprobs[0].bytes for o in outputs if o.token_ids[0] not in special)
        assert raw.decode("utf-8", "replace") == texts(found)[str(index)]


def test_a_stop_string_of_the_answer_cuts_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = prompt(engine, "Describe it.")
    whole = texts(run(engine, [one]))["0"]
    stop = whole[1:3]
    found = run(engine, [one], replace(GREEDY, stop=(stop,)))
    assert texts(found)["0"] == whole[: whole.find(stop)]
    assert found["0"][-1].finish_reason is FinishReason.STOP
    assert len(found["0"]) < GREEDY.max_tokens


def test_the_models_end_token_ends_the_answer_silently(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = prompt(engine, "Describe it.")
    ids = tokens(run(engine, [one])["0"])
    found = run(engine, [one], replace(GREEDY, stop_token_ids=(ids[3],)))
    end = ids.index(ids[3])
    assert tokens(found["0"]) == ids[: end + 1]
    assert found["0"][-1].finish_reason is FinishReason.STOP
    assert texts(found)["0"] == engine.tokenizer.decode(ids[:end])


def test_a_poisoned_picture_ends_its_own_request_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16)
    asked = prompts(engine)
    expected = run(engine, asked)
    bad = replace(asked[0].images[0], patches=np.full_like(asked[0].images[0].patches, np.nan))
    for _ in range(2):  # twice: its blocks go to others in between
        found = run(engine, [replace(asked[0], images=(bad,)), *asked[1:]])
        assert found["0"][-1].finish_reason is FinishReason.ERROR
        assert "not finite" in (found["0"][-1].error or "")
        assert tokens(found["0"]) == []
        for index in range(1, 8):
            assert tokens(found[str(index)]) == tokens(expected[str(index)])


def test_the_smallest_temperature_harms_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine()
    asked = prompts(engine)[:2]
    tiny = replace(GREEDY, temperature=1e-46)
    found = run(engine, asked, [tiny, GREEDY])
    assert texts(found) == texts(run(engine, asked))


def test_bad_requests_between_good_ones_harm_none(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while others run, or ended alone by a row of NaN in the middle of its answer."""
    engine = make_engine(num_kv_blocks=30, max_num_seqs=4)
    asked = prompts(engine)[:4]
    expected = run(engine, asked)
    for index, one in enumerate(asked):
        engine.add(Request(str(index), one, GREEDY))
    outputs = [engine.step() for _ in range(3)]
    assert engine.num_running == 4
    assert engine.max_model_len == 29 * 16 < 512, "more than the pool holds would never fit"
    long = Prompt.from_token_ids([5] * engine.max_model_len)
    for bad, message in [(long, "serves at most 464"), (Prompt.from_token_ids([]), "is empty")]:
        with pytest.raises(RequestError, match=message):
            engine.add(Request("bad", bad, GREEDY))
    with pytest.raises(RequestError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    run_step = engine._runner.run

    def poisoned(chunks: list[Any]) -> torch.Tensor:
        logits = run_step(chunks)
        sampled = [chunk.sequence.request_id for chunk in chunks if chunk.is_sampled]
        logits[sampled.index("2"), 7] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", poisoned)
        outputs.append(engine.step())
    found = finish(engine)
    (ended,) = [one for one in outputs[-1] if one.request_id == "2"]
    assert ended.finish_reason is FinishReason.ERROR
    assert "other requests are not affected" in (ended.error or "")
    assert "2" not in found
    for key in "013":
        ids = [i for each in outputs for o in each if o.request_id == key for i in o.token_ids]
        assert ids + tokens(found[key]) == tokens(expected[key])


def test_slots_beyond_the_context_are_never_read(make_engine: MakeEngine) -> None:
    engine, poisoned = make_engine(), make_engine()
    for layer in poisoned._runner.kv_cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    expected, found = run(engine, prompts(engine)), run(poisoned, prompts(poisoned))
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}


def test_abort_in_every_state_frees_everything(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_batch_tokens=16)
    asked = prompts(engine)
    expected = tokens(run(engine, [asked[1]])["0"])
    for state, steps in {"waiting": 0, "inside a picture": 2, "decoding": 10}.items():
        engine.add(Request("picture", asked[2], GREEDY))
        for _ in range(steps):
            engine.step()
        engine.add(Request("waits", asked[3], GREEDY))
        last = engine.abort("picture")
        assert last is not None, state
        assert last.finish_reason is FinishReason.ABORT
        engine.abort("waits")
        assert (engine.num_running, engine.num_waiting, engine.kv_usage) == (0, 0, 0.0)
        assert engine.abort("picture") is None
        assert engine.step() == []
    assert tokens(run(engine, [asked[1]])["0"]) == expected


def test_picture_embeddings_live_only_while_they_are_read(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16)
    one = prompt(engine, "Which one is larger?", picture(2), picture(3, 56, 140))
    engine.add(Request("r", one, GREEDY))
    sequence = engine._sequences["r"]
    held = set()
    while engine.has_unfinished():
        engine.step()
        held.add(len(sequence.image_embeds))
        if sequence.num_computed >= sequence.num_prompt_tokens:
            assert not sequence.image_embeds
    assert held == {0, 1}


def test_what_is_too_long_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=40)
    with pytest.raises(ContextLengthError) as caught:
        engine.add(Request("r", Prompt.from_token_ids([5] * 40), GREEDY))
    assert (caught.value.num_prompt_tokens, caught.value.max_model_len) == (40, 40)
    found = run(engine, [Prompt.from_token_ids([5] * 39), Prompt.from_token_ids([5] * 30)])
    assert [len(tokens(each)) for each in found.values()] == [1, 10]
    assert {each[-1].finish_reason for each in found.values()} == {FinishReason.LENGTH}


def test_the_pool_limits_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=3, block_size=16)
    assert engine.max_model_len == 32
    with pytest.raises(ContextLengthError):
        engine.add(Request("r", Prompt.from_token_ids([5] * 32), GREEDY))
    assert len(tokens(run(engine, [Prompt.from_token_ids([5] * 25)])["0"])) == 7


def test_prompts_that_do_not_fit_the_model_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    good = prompt(engine, "What is this?", picture(0))
    narrow = good.images[0].patches[:, 1:]
    engine.add(Request("used", good, GREEDY))
    cases = {
        "is in use": ("used", good),
        "is empty": ("r", Prompt.from_token_ids([])),
        "outside the vocabulary": ("r", Prompt.from_token_ids([1, 10**6])),
        r"positions must be \[3, ": ("r", replace(good, positions=good.positions[:, 1:])),
        "picture placeholders": ("r", replace(good, images=good.images * 2)),
        "picture 0 has": (
            "r",
            replace(good, images=(replace(good.images[0], patches=good.images[0].patches[1:]),)),
        ),
        r"of shape \[1175\]; this model's vision tower takes \[1176\]": (
            "r",
            replace(good, images=(replace(good.images[0], patches=narrow),)),
        ),
    }
    for message, (request_id, bad) in cases.items():
        with pytest.raises(RequestError, match=message):
            engine.add(Request(request_id, bad, GREEDY))
    assert list(finish(engine)) == ["used"]


def test_an_engine_that_failed_says_so(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.add(Request("r", prompt(engine, "?"), GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", lambda chunks: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    with pytest.raises(EngineDeadError):
        engine.step()
    with pytest.raises(EngineDeadError):
        engine.add(Request("s", prompt(engine, "?"), GREEDY))


def test_memory_summary_counts_what_is_there(make_engine: MakeEngine) -> None:
    engine = make_engine()
    memory = engine.memory_summary()
    parameters = sum(p.nbytes for p in engine._runner.model.parameters())
    buffers = sum(b.nbytes for b in engine._runner.model.buffers())
    assert memory.weights_bytes == parameters + buffers
    assert 0 < memory.decode_bytes < memory.weights_bytes
    config, text = engine.config, engine.model_config.text_config
    per_token = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert memory.kv_cache_bytes == per_token * config.block_size * config.num_kv_blocks
    assert memory.peak_rss_bytes > memory.weights_bytes
    assert memory.peak_device_bytes is None
