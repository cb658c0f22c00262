"""Work on a CPU cut over as many threads as torch may use (called by `cpu` and the quantizer).

Not here: compiled code. What runs on the threads must let go of the interpreter to gain anything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

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
    finally:  # what the others write to must outlive them, however this part ends
        wait(waiting)
    for future in waiting:
        future.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Make the worker threads, once a process (threads do not survive a fork) and thread count."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="mgvq-cpu")
