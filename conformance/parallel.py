"""The same function over many tasks, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from conformance.garbage import rarely_collected

Task = TypeVar("Task")
Result = TypeVar("Result")


def _begin() -> None:
    rarely_collected()
    torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other


def each_done(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, jobs: int
) -> Iterator[tuple[Task, Result]]:
    """Tasks with their results, in the order in which they are done.

    Args:
        work: A function at the top of a module.
        tasks: What it is called with.
        jobs: How many processes; one does without any.
    """
    if jobs == 1:
        _begin()
        for task in tasks:
            yield task, work(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork may inherit a lock of torch's
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as pool:
        waiting = {pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
