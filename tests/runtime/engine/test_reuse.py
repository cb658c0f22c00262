"""What is computed once and used again - blocks, pictures, patches - never gives a wrong answer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.image import EncodedImage, open_image
from mgvq_runtime.request import FinishReason, Prompt, Request
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


@pytest.fixture
def encoded(loaded_tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of pictures of each call of the vision tower."""
    calls: list[int] = []
    model = loaded_tiny_model[0]
    encode = model.encode_images
    monkeypatch.setattr(
        model, "encode_images", lambda p, g, *more: calls.append(len(g)) or encode(p, g, *more)
    )
    return calls


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Files whose pixels were decoded."""
    files: list[bytes] = []
    decode = EncodedImage.decode
    monkeypatch.setattr(
        EncodedImage, "decode", lambda self: files.append(self.data) or decode(self)
    )
    return files


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def run_one(engine: Engine, one: Prompt, **fields: Any) -> tuple[list[int], int]:
    """Return the answer's tokens, and how many of the prompt's were cached."""
    engine.add(Request("r", one, GREEDY, **fields))
    outputs = finish(engine)["r"]
    return tokens(outputs), outputs[-1].num_cached_tokens


@pytest.mark.parametrize("changes", [{}, {"max_batch_tokens": 16}, {"block_size": 5}])
def test_a_warm_cache_gives_the_answers_of_a_cold_one(
    make_engine: MakeEngine, encoded: list[int], changes: dict[str, int]
) -> None:
    engine = make_engine(**changes)
    asked = prompts(engine)
    cold = run(engine, asked)
    assert sum(encoded) == 5
    del encoded[:]
    warm = run(engine, asked)
    assert {k: tokens(v) for k, v in warm.items()} == {k: tokens(v) for k, v in cold.items()}
    assert encoded == [], "a picture that is known is not encoded"
    size = engine.config.block_size
    for key, one in enumerate(asked):
        expected = (len(one.token_ids) - 1) // size * size
        assert warm[str(key)][0].num_cached_tokens == expected
    engine = make_engine(**changes, image_cache_bytes=0)
    run(engine, asked)
    del encoded[:]
    run(engine, [replace(one, token_ids=[5, *one.token_ids[1:]]) for one in asked])
    assert sum(encoded) == 5, "nothing was kept"


def test_prompts_that_come_together_read_their_beginning_once(
    make_engine: MakeEngine, encoded: list[int]
) -> None:
    engine = make_engine()
    one = prompts(engine)[2]
    expected = run_one(make_engine(image_cache_bytes=0), one)[0]
    del encoded[:]
    outputs = run(engine, [one] * 3)
    assert all(tokens(outputs[key]) == expected for key in outputs)
    size = engine.config.block_size
    shared = (len(one.token_ids) - 1) // size * size
    assert [outputs[key][-1].num_cached_tokens for key in "012"] == [0, shared, shared]
    assert sum(encoded) == 1


def test_pictures_of_one_size_never_share(make_engine: MakeEngine) -> None:
    """The first token after the picture would be the same placeholder ids for both."""
    engine = make_engine()
    asked = [prompt(engine, "What is this?", picture(seed)) for seed in range(6)]
    assert len({tuple(one.token_ids) for one in asked}) == 1
    expected = [run_one(make_engine(image_cache_bytes=0), one)[0] for one in asked]
    assert len({tuple(answer) for answer in expected}) > 1
    start = asked[0].token_ids.index(engine.model_config.image_token_id)
    for one, answer in zip([*asked, *asked], [*expected, *expected], strict=True):
        found, cached = run_one(engine, one)
        assert found == answer
        assert cached <= start or one in asked[:6]
    first = run_one(engine, replace(asked[0], images=asked[1].images))
    assert first[0] == expected[1], "the same tokens with another picture behind them"


def test_videos_of_one_length_never_share(make_engine: MakeEngine, encoded: list[int]) -> None:
    """Nor do two of the same frames in another order; one that comes again is all there."""
    engine = make_engine()
    frames = [picture(seed) for seed in range(4)]
    content = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    asked = [
        engine.chat_processor.prepare([{"role": "user", "content": content}], [video])
        for video in (frames, frames[::-1], [*frames[:3], picture(9)])
    ]
    assert len({tuple(one.token_ids) for one in asked}) == 1
    start = asked[0].token_ids.index(engine.model_config.video_token_id)
    expected = [run_one(make_engine(image_cache_bytes=0), one)[0] for one in asked]
    del encoded[:]
    first = [run_one(engine, one) for one in asked]
    assert [answer for answer, _ in first] == expected
    assert max(cached for _, cached in first) <= start
    assert encoded == [1, 1, 1]
    again = [run_one(engine, one) for one in asked]
    assert again == [(answer, (len(asked[0].token_ids) - 1) // 16 * 16) for answer in expected]
    assert encoded == [1, 1, 1]


def test_a_second_turn_reads_only_what_is_new(make_engine: MakeEngine, encoded: list[int]) -> None:
    engine = make_engine()
    first = prompt(engine, "How many red circles are there?", picture(1, 140, 112))
    answer, cached = run_one(engine, first)
    assert cached == 0
    ids = [*first.token_ids, *answer, *prompt(engine, "And blue ones?").token_ids]
    delta = np.arange(len(first.token_ids), len(ids)) + first.position_delta
    positions = np.concatenate([first.positions, np.tile(delta, (3, 1))], axis=1)
    second = Prompt(ids, first.images, positions, first.position_delta)
    found, cached = run_one(engine, second)
    known = len(first.token_ids) + len(answer) - 1  # the last token of an answer is never run
    assert cached == known // 16 * 16
    assert encoded == [1]
    assert found == run_one(make_engine(), second)[0]


def test_positions_and_salts_separate(make_engine: MakeEngine, encoded: list[int]) -> None:
    engine = make_engine()
    one = prompt(engine, "Describe it, please, in many words.", picture(2))
    shifted = replace(one, positions=one.positions + 3)
    answer, _ = run_one(engine, one)
    assert run_one(engine, shifted)[1] == 0
    assert run_one(engine, one, cache_salt="tenant")[1] == 0
    assert len(encoded) == 2, "another tenant's picture is encoded again"
    assert run_one(engine, one, cache_salt="tenant") == (
        answer,
        (len(one.token_ids) - 1) // 16 * 16,
    )


def test_an_evicted_beginning_is_computed_again(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=12)
    one = prompt(engine, "What is in the picture?", picture(0))
    answer, _ = run_one(engine, one)
    assert run_one(engine, one)[1] == 32
    run_one(engine, Prompt.from_token_ids([5] * 155))  # takes all of the 11 blocks
    assert run_one(engine, one) == (answer, 0)


def test_what_is_not_finite_is_not_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16)
    one = prompt(engine, "Which one is larger? " * 4, picture(2))
    bad = replace(one.images[0], patches=np.full_like(one.images[0].patches, np.nan))
    for _ in range(2):
        engine.add(Request("r", replace(one, images=(bad,)), GREEDY))
        (last,) = finish(engine)["r"]
        assert last.finish_reason is FinishReason.ERROR
        assert last.num_cached_tokens == 0


def test_a_request_ends_when_its_time_is_up_waiting_or_running(
    loaded_tiny_model: Any,
) -> None:
    now = [100.0]
    model, processor, resolved = loaded_tiny_model
    one_at_a_time = replace(resolved, max_num_seqs=1)
    engine = Engine(model, processor, one_at_a_time, clock=lambda: now[0])
    asked = prompt(engine, "Describe it.")
    engine.add(Request("runs", asked, GREEDY, timeout_s=5.0))
    engine.add(Request("waits", asked, GREEDY, timeout_s=4.0))
    engine.add(Request("patient", asked, GREEDY))
    before = [engine.step() for _ in range(3)]
    assert all(output.request_id == "runs" for outputs in before for output in outputs)
    now[0] = 104.0
    ended, going = engine.step()
    assert (ended.request_id, ended.finish_reason) == ("waits", FinishReason.TIMEOUT)
    assert ended.error == "the request did not end within 4 seconds"
    assert going.request_id == "runs"
    now[0] = 1000.0
    ended, going = engine.step()
    assert (ended.request_id, ended.num_completion_tokens) == ("runs", 4)
    assert going.request_id == "patient"
    outputs = finish(engine)
    assert outputs["patient"][-1].finish_reason is FinishReason.LENGTH


def test_priorities_order_the_queue(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    asked = prompt(engine, "Describe it.")
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", -7)]:
        engine.add(Request(name, asked, GREEDY, priority=priority))
    ends = []
    while engine.has_unfinished():
        ends += [o.request_id for o in engine.step() if o.finish_reason is not None]
    assert ends == ["d", "a", "c", "b"]


def test_a_picture_sent_again_is_not_decoded(loaded_tiny_model: Any, decoded: list[bytes]) -> None:
    old = loaded_tiny_model[1]
    processor = ChatProcessor(old.tokenizer, old.image_processor, old.config, 1 << 20)
    files = [png(seed) for seed in range(2)]
    first = processor.process([open_image(files[0])])
    again = processor.process([open_image(files[0]), open_image(files[1]), open_image(files[0])])
    third = processor.process([open_image(files[1]), open_image(files[0])])
    assert again[0] is again[2] is third[1]
    assert decoded == [files[0], *files], "alone and among others may be cut differently"
    assert first[0].digest == again[0].digest != again[1].digest
    plain = processor.process([Image.open(io.BytesIO(files[0])).convert("RGB")])[0]
    assert plain.digest == first[0].digest, "the digest is of what the model sees"
    none = ChatProcessor(old.tokenizer, old.image_processor, old.config)
    none.process([open_image(files[0])])
    none.process([open_image(files[0])])
    assert len(decoded) == 5


def test_a_video_sent_again_is_not_decoded(loaded_tiny_model: Any, decoded: list[bytes]) -> None:
    old = loaded_tiny_model[1]
    processor = ChatProcessor(old.tokenizer, old.image_processor, old.config, 1 << 20)
    files = [png(seed) for seed in range(3)]

    def video(*numbers: int) -> list[EncodedImage]:
        return [open_image(files[number]) for number in numbers]

    (first,) = processor.process([video(0, 1, 2)])
    assert processor.process([video(0, 1, 2)])[0] is first
    assert decoded == files
    others = processor.process([video(2, 1, 0), video(0, 1), video(0), *video(0)])
    assert len({image.digest for image in (first, *others)}) == 5, "a frame is no picture"
    del decoded[:]
    mixed = [*video(0, 1), Image.open(io.BytesIO(files[2])).convert("RGB")]
    assert processor.process([mixed])[0].digest == first.digest, "the same frames, one decoded"
    assert decoded == files[:2]
