"""The engine thread and its mailboxes, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mgvq_runtime import Prompt, Request, SamplingParams
from mgvq_runtime.errors import ContextLengthError, EngineDeadError, RequestError
from mgvq_serve.engine_thread import EngineThread
from tests.serve.fake_engine import FakeEngine


def request(engine: FakeEngine, name: str, text: str = "a b", **params: int) -> Request:
    prompt = engine.chat_processor.prepare([{"role": "user", "content": text}], [])
    return Request(name, prompt, SamplingParams(**params))


def run(test: Callable[[FakeEngine, EngineThread], Awaitable[None]]) -> FakeEngine:
    async def main() -> FakeEngine:
        engine = FakeEngine()
        thread = EngineThread(engine)
        thread.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(test(engine, thread), 20)
        finally:
            engine.gate.set()
            await asyncio.to_thread(thread.stop)
            thread.stop()  # twice does no harm
        assert thread.is_dead
        assert thread.num_open == 0
        return engine

    return asyncio.run(main())


async def read_text(mailbox) -> str:
    text = ""
    while mailbox.open_ids:
        text += "".join(output.text for output in await mailbox.take(None))
    return text


def test_outputs_arrive_in_order() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        mailbox = await thread.submit([request(engine, "x", "count", max_tokens=300)])
        assert await read_text(mailbox) == " ".join(str(i) for i in range(1, 301))
        thread.release(mailbox)

    assert run(test).aborted == []


def test_refusal_of_one_refuses_all() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        with pytest.raises(RequestError, match="second"):
            await thread.submit([request(engine, f"x-{i}", "refuse") for i in range(3)])
        assert not engine.has_unfinished()
        with pytest.raises(ContextLengthError):
            await thread.submit([Request("y", Prompt.from_token_ids([0] * 600), SamplingParams())])
        assert await read_text(await thread.submit([request(engine, "z")])) == "a b"
        thread.release(thread._mailboxes["z"])

    assert run(test).aborted == ["x-0"]


def test_release_aborts_what_has_not_ended() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        mailbox = await thread.submit(
            [request(engine, "short", max_tokens=1), request(engine, "long", "count")]
        )
        while "short" in mailbox.open_ids:
            await mailbox.take(None)
        thread.release(mailbox)
        while engine.has_unfinished():
            await asyncio.sleep(0.01)

    assert run(test).aborted == ["long"]


def test_cancelling_a_submit_leaves_nothing_behind() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        engine.gate.clear()
        first = await thread.submit([request(engine, "first", "count")])
        await asyncio.sleep(0.05)  # the thread is inside the step now
        waiting = asyncio.create_task(thread.submit([request(engine, "second", "count")]))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        engine.gate.set()
        thread.release(first)
        while engine.has_unfinished() or len(engine.aborted) < 2:
            await asyncio.sleep(0.01)

    assert sorted(run(test).aborted) == ["first", "second"]


def test_take_gives_up_after_its_time() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        engine.gate.clear()
        mailbox = await thread.submit([request(engine, "x")])
        assert await mailbox.take(0.02) == []
        engine.gate.set()
        assert await read_text(mailbox) == "a b"
        thread.release(mailbox)

    run(test)


def test_a_dead_engine_tells_everybody() -> None:
    async def test(engine: FakeEngine, thread: EngineThread) -> None:
        told = asyncio.Event()
        thread.on_failure = told.set
        engine.gate.clear()
        mailbox = await thread.submit([request(engine, "x")])
        engine.fails_next_step = True
        engine.gate.set()
        with pytest.raises(EngineDeadError):
            await read_text(mailbox)
        await told.wait()
        assert thread.is_dead
        assert thread.has_failed
        with pytest.raises(EngineDeadError):
            await thread.submit([request(engine, "y")])
        thread.release(mailbox)

    run(test)
