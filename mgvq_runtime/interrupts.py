"""Ctrl-C, kept back until it does no harm (used by `llm` and `cli`).

A KeyboardInterrupt inside a step would leave an engine that nobody can trust any more. Python runs
handlers of signals in the main thread alone, so in other threads there is nothing to keep back.
Only SIGINT is looked at; what happens in the end is up to the handler that was there before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collect_ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C in the list it gives, instead of raising: the block looks there."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield pressed  # a handler that is not Python's could not be put back
        return
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def hold_ctrl_c() -> Iterator[None]:
    """Let a Ctrl-C that comes in the block act at its end, however it ends."""
    pressed: list[int] = []
    try:
        with collect_ctrl_c() as pressed:
            yield
    finally:
        if pressed:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # not raised again: an event loop has heard of it already
                handler(signal.SIGINT, None)
            else:
                signal.raise_signal(signal.SIGINT)
