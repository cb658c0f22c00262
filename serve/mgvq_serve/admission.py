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
            max_open_bytes: Bytes of request bodies held at the same time.
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
        raise self._busy(
            f"{self.num_open} answers are open and at most {self.max_open} may be "
            "(--max-num-seqs plus --max-queue)"
        )

    @contextmanager
    def hold_body(self, num_bytes: int) -> Iterator[None]:
        """Count a body for as long as the block runs; the first one always fits.

        Raises:
            ApiError: 429 when the bodies that are open are too large together.
        """
        if self.open_bytes and self.open_bytes + num_bytes > self.max_open_bytes:
            raise self._busy(f"open requests hold {self.open_bytes / 1e6:.0f} MB")
        self.open_bytes += num_bytes
        try:
            yield
        finally:
            self.open_bytes -= num_bytes

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

    def _busy(self, why: str) -> ApiError:
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
