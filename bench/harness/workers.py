"""Work that is not timed, side by side.

Most tensors of the benchmark are so small that a second thread hardly helps: on a CPU each worker has one thread, and
there are as many workers as torch would use threads. So figures do not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def results(
    function: Callable[..., Result],
    jobs: Sequence[tuple[Any, ...]],
    device: torch.device,
    done: Callable[[int], None],
) -> list[Result]:
    """What `function` returns for the arguments of each job, in order; `done` is told the index of each as it ends.

    The function and its arguments are pickled. On a GPU the jobs run here, one after the other.
    """
    if device.type != "cpu":
        found = []
        for index, job in enumerate(jobs):
            found.append(function(*job))
            done(index)
        return found
    with ProcessPoolExecutor(
        min(torch.get_num_threads(), len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        pending = {pool.submit(function, *job): index for index, job in enumerate(jobs)}
        for future in as_completed(pending):
            future.result()
            done(pending[future])
        return [future.result() for future in pending]
