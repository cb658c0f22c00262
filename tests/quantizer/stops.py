"""Runs of `mgvq-quantize` that are stopped at a chosen file: a full disk, a kill (for the tests).

Every file of a work folder and of a checkpoint passes `os.fsync` before it counts as written. That
is where a run is stopped, with half of the file on the disk.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mgvq_quantizer import cli


def watch_files(
    patch: pytest.MonkeyPatch, stops: Callable[[str], bool], stop: Callable[[], None]
) -> None:
    """Call `stop` in the middle of writing each file, or flushing each folder, that `stops`."""
    flush = os.fsync

    def fsync(handle: int) -> None:
        if stops(Path(os.readlink(f"/proc/self/fd/{handle}")).name):
            with suppress(OSError):  # a folder cannot be cut
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            stop()
        flush(handle)

    patch.setattr(os, "fsync", fsync)


def start(
    arguments: list[str],
    log: Path,
    kill_at: str = "",
    kill_after: float = 0.0,
    largest: int = 0,
) -> BaseProcess:
    """Run the command in a process of its own.

    Args:
        arguments: of the command.
        log: the file that gets what it says.
        kill_at: it kills itself while it writes a file of this name.
        kill_after: the system ends it after so many seconds of processor time, wherever it is.
        largest: bytes of the largest file it may write; 0 for no limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mgvq_quantizer.cli", "mgvq_quantizer.cpu_search"])
    process = context.Process(target=_run, args=(arguments, log, kill_at, kill_after, largest))
    process.start()
    return process


def _run(arguments: list[str], log: Path, kill_at: str, kill_after: float, largest: int) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if kill_after:
        signal.setitimer(signal.ITIMER_PROF, kill_after)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    with pytest.MonkeyPatch.context() as patch:
        if kill_at:
            watch_files(patch, kill_at.__eq__, lambda: os.kill(os.getpid(), signal.SIGKILL))
        raise SystemExit(cli.main(arguments))
