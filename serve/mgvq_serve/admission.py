"""How much work may be open at once (asked by `chat.ChatService` for every request).

Counts answers that run or wait, and the bytes of their bodies. Past either limit a request is
refused with 429 and a time to wait, instead of growing a queue nobody sees the end of. Does not
order anything: that is the engine's scheduler. Used on the event loop only, so there is no lock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mgvq_serve.errors import ApiError, unavailable

MAX_RETRY_AFTER_S = 60
DURATION_WEIGHT = 0.2  # share of the newest request in the running mean of durations


class Admission:
    """Counts open answers and the bytes behind them."""

    def __init__(self, max_running: int, max_queue: int, max_open_bytes: int) -> None:
        """Set the limits.

        Args:
            max_running: Answers the engine works on at the same time.
            max_queue: Answers that may wait besides.
            max_open_bytes: Bytes of request bodies held at the same time, as far as they have come.
        """
        self.max_running = max_running
        self.max_open = max_running + max_queue
        self.max_open_bytes = max_open_bytes
        self.num_open = 0
        self.open_bytes = 0
        self.is_draining = False
        self._mean_duration_s = 1.0

    def check(self, num_answers: int = 1) -> None:
        """Refuse what does not fit, without counting it.

        Raises:
            ApiError: 503 while the server shuts down; 429 when it is full.
        """
        if self.is_draining:
            raise unavailable("The server is shutting down.", "draining")
        if self.num_open + num_answers <= self.max_open:
            return
        if not self.num_open:
            raise ApiError(
                400,
                f"n={num_answers} is more than this server runs at once ({self.max_open})",
                param="n",
            )
        raise self.busy(
            f"{self.num_open} answers are open and at most {self.max_open} may be "
            "(--max-num-seqs plus --max-queue)"
        )

    @contextmanager
    def hold_body(self) -> Iterator[BodyHold]:
        """Count a body, as it arrives, until the block ends."""
        hold = BodyHold(self)
        try:
            yield hold
        finally:
            hold.release()

    @contextmanager
    def admit(self, num_answers: int) -> Iterator[None]:
        """Count answers as open for as long as the block runs.

        Raises:
            ApiError: as `check`.
        """
        self.check(num_answers)
        start_s = time.monotonic()
        self.num_open += num_answers
        try:
            yield
        finally:
            self.num_open -= num_answers
            duration_s = time.monotonic() - start_s
            self._mean_duration_s += DURATION_WEIGHT * (duration_s - self._mean_duration_s)

    def busy(self, why: str) -> ApiError:
        """Return the 429 of a server that is full."""
        return ApiError(
            429,
            f"The server is busy: {why}. Try again shortly.",
            error_type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(self.retry_after_s())},
        )

    def retry_after_s(self) -> int:
        """Return whole seconds after which a place is likely free, from 1 to 60."""
        rounds = max(1.0, self.num_open / self.max_running)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._mean_duration_s * rounds)))


class BodyHold:
    """The bytes of one body that have arrived; what a client only announces is not held."""

    def __init__(self, admission: Admission) -> None:
        """Start with none; `Admission.hold_body` makes it."""
        self._admission = admission
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count more bytes; a body that is alone always fits.

        Raises:
            ApiError: 429 when the bodies that are open are too large together.
        """
        others = self._admission.open_bytes - self._num_bytes
        total = self._admission.open_bytes + num_bytes
        if others and total > self._admission.max_open_bytes:
            raise self._admission.busy(f"open requests hold {others / 1e6:.0f} MB")
        self._admission.open_bytes = total
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Count none of them any more."""
        self._admission.open_bytes -= self._num_bytes
        self._num_bytes = 0
