"""The one thread that touches the engine, and the mailboxes it fills (used by `chat`).

Event loop to thread: an inbox of requests to add or abort, read before every step. Thread to event
loop: one `call_soon_threadsafe` a step with everything the step produced. An engine that raises
ends the thread: every open mailbox gets an error, nothing is accepted any more and `on_failure` is
called. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mgvq_runtime import Request, RequestOutput
from mgvq_runtime.errors import EngineDeadError, MgvqError

log = logging.getLogger("mgvq_serve")


class EngineLike(Protocol):
    """What the thread needs of `mgvq_runtime.Engine`."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[RequestOutput]:
        """Advance every running request by one step."""

    def abort(self, request_id: str) -> object:
        """Forget a request, in whatever state it is."""

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""


class Mailbox:
    """Where the outputs of one HTTP request arrive; read on the event loop only.

    A reader that is slow finds several outputs at once and merges them: the engine never waits.
    """

    def __init__(self, requests: Sequence[Request], loop: asyncio.AbstractEventLoop) -> None:
        """Make a mailbox for the answers of one HTTP request."""
        self.requests = tuple(requests)
        self.open_ids = {request.request_id for request in requests}
        self.added: asyncio.Future[None] = loop.create_future()
        self._outputs: list[RequestOutput] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    async def take(self, timeout_s: float | None) -> list[RequestOutput]:
        """Wait for outputs and take all that are there.

        Args:
            timeout_s: Longest wait in seconds; None waits without end.

        Returns:
            Outputs in the order they were made; empty when the time is up.

        Raises:
            Exception: what `fail` was given, if it ended these requests.
        """
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of 3.11 can lose a cancellation
                await self._arrived.wait()
        except TimeoutError:
            return []
        if self._error is not None and not self._outputs:
            raise self._error
        outputs, self._outputs = self._outputs, []
        if self._error is None:
            self._arrived.clear()
        return outputs

    def put(self, output: RequestOutput) -> None:
        """Deliver one output."""
        self._outputs.append(output)
        if output.finish_reason is not None:
            self.open_ids.discard(output.request_id)
        self._arrived.set()

    def accept(self, error: Exception | None) -> None:
        """Report whether the engine took the requests."""
        if self.added.done():
            return
        if error is None:
            self.added.set_result(None)
        else:
            self.open_ids.clear()
            self.added.set_exception(error)

    def fail(self, error: Exception) -> None:
        """End the requests with an error, after the outputs already delivered."""
        if not self.open_ids:
            return
        self.accept(error)
        self.open_ids.clear()
        self._error = error
        self._arrived.set()


@dataclass(frozen=True)
class _Add:
    mailbox: Mailbox


@dataclass(frozen=True)
class _Abort:
    request_ids: tuple[str, ...]


class EngineThread:
    """Runs an engine in a thread of its own, for one event loop."""

    def __init__(self, engine: EngineLike) -> None:
        """Wrap an engine; nothing runs before `start`."""
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}  # by request id; touched on the event loop only
        self._thread = threading.Thread(target=self._run, name="mgvq-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self.is_dead = False  # the thread has ended, for whatever reason
        self.has_failed = False
        self.on_failure: Callable[[], None] = lambda: None
        """Called on the event loop when the engine has failed and everybody has been told."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; outputs go to mailboxes on `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step it is in; what is open gets an error. May be repeated."""
        self._is_stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning("the engine is still in a step after %g s; leaving it", timeout_s)

    @property
    def num_open(self) -> int:
        """How many answers have not ended."""
        return len(self._mailboxes)

    async def submit(self, requests: Sequence[Request]) -> Mailbox:
        """Hand requests to the engine and wait until it has taken or refused them.

        The caller owes a `release` of the mailbox; if this raises or is cancelled, nothing is owed.

        Raises:
            RequestError: if the engine refuses one; none of them runs then.
            Exception: whatever else the engine tripped over while taking them.
            EngineDeadError: if there is no engine any more.
        """
        if self.is_dead or self._is_stopping:
            raise EngineDeadError("the engine has stopped")
        mailbox = Mailbox(requests, asyncio.get_running_loop())
        for request in requests:
            self._mailboxes[request.request_id] = mailbox
        self._inbox.put(_Add(mailbox))
        try:
            await mailbox.added
        except BaseException:
            self.release(mailbox)
            raise
        return mailbox

    def release(self, mailbox: Mailbox) -> None:
        """Forget a mailbox; whatever has not ended is aborted in the engine."""
        if mailbox.open_ids:
            self._inbox.put(_Abort(tuple(mailbox.open_ids)))
        for request in mailbox.requests:
            self._mailboxes.pop(request.request_id, None)

    def fail_open(self, error: Exception) -> None:
        """End every open request with an error (called when the server shuts down)."""
        for mailbox in set(self._mailboxes.values()):
            unfinished = tuple(mailbox.open_ids)
            mailbox.fail(error)
            self._inbox.put(_Abort(unfinished))

    # ------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        try:
            while self._read_inbox():
                outputs = self._engine.step() if self._engine.has_unfinished() else []
                if outputs:
                    self._to_loop(self._deliver, outputs)
        except Exception:
            self.has_failed = True
            log.exception("the engine failed; no more requests are taken")
        finally:
            self.is_dead = True
            self._to_loop(self.fail_open, EngineDeadError("the engine has stopped"))
            if self.has_failed:
                self._to_loop(self.on_failure)

    def _read_inbox(self) -> bool:
        """Obey the inbox, waiting for it where the engine is idle; return False to stop."""
        while True:
            try:
                message = self._inbox.get(block=not self._engine.has_unfinished())
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Abort):
                for request_id in message.request_ids:
                    self._engine.abort(request_id)
            else:
                self._add(message.mailbox)

    def _add(self, mailbox: Mailbox) -> None:
        added: list[str] = []
        try:
            for request in mailbox.requests:
                self._engine.add(request)
                added.append(request.request_id)
        except Exception as error:  # a bad request fails alone, whatever it tripped over
            if not isinstance(error, MgvqError):
                log.exception("the engine failed to take a request")
            for request_id in added:
                self._engine.abort(request_id)
            self._to_loop(mailbox.accept, error)
        else:
            self._to_loop(mailbox.accept, None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None and output.request_id in mailbox.open_ids:
                mailbox.put(output)

    def _to_loop(self, function: object, *arguments: object) -> None:
        assert self._loop is not None, "started without a loop"
        try:
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
        except RuntimeError:
            log.debug("the event loop has closed before the engine stopped")
