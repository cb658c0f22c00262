"""Work on a CPU cut over as many threads as torch may use (called by `cpu` and the quantizer).

Not here: compiled code. What runs on the threads must let go of the interpreter to gain anything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


def over_threads(
    run: Callable[[int, int], None], first: int, last: int, unit: int, is_much: bool
) -> None:
    """Cut first..last into equal runs of whole units, one a thread, if there is much to do.

    Args:
        run: called with the ends of each run, at once on several threads, one of them the caller's.
        first: where the first run begins.
        last: where the last run ends.
        unit: runs begin at multiples of it, counted from `first`.
        is_much: whether handing a part to another thread (20 to 50 us) can pay.
    """
    units = -(-(last - first) // unit)
    threads = min(torch.get_num_threads(), units) if is_much else 1
    if threads <= 1:
        run(first, last)
        return
    cuts = [first + units * i // threads * unit for i in range(threads)]
    cuts.append(last)
    pool = _pool(os.getpid(), threads)
    waiting = [pool.submit(run, cuts[i], cuts[i + 1]) for i in range(1, threads)]
    try:
        run(cuts[0], cuts[1])
    finally:
        _wait_for_all(waiting)
    for future in waiting:
        future.result()


def _wait_for_all(futures: Sequence[Future[None]]) -> None:
    """Wait whatever happens: what other threads write to must outlive them.

    Raises:
        BaseException: what came while waiting, such as Ctrl-C, once all are done.
    """
    came: BaseException | None = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:  # noqa: BLE001  raised below
            came = error
    if came is not None:
        raise came


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Make the worker threads, once a process (threads do not survive a fork) and thread count."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="mgvq-cpu")
