"""Work that is not timed, side by side.

Most tensors of the benchmark are so small that a second thread hardly helps: on a CPU each worker has one thread, and
there are as many workers as torch would use threads. So figures do not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
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

    The function and its arguments are pickled. On a GPU the jobs run here, one after the other. Where one fails, or an
    interrupt comes, no other begins.
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
        try:
            for future in as_completed(pending):
                future.result()
                done(pending[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in pending]


def run_within(seconds: float, function: Callable[..., object], jobs: Sequence[tuple[Any, ...]], count: int) -> None:
    """Call `function` with the arguments of each job, in a process of its own, so many at a time.

    After so many seconds the processes that still run are ended, with all that they have started, and waited for: what
    is timed next has the machine to itself. A process that fails costs its own job alone.
    """
    context = multiprocessing.get_context("spawn")
    waiting = [context.Process(target=_in_own_group, args=(function, job)) for job in jobs]
    running: list[SpawnProcess] = []
    until = time.monotonic() + seconds
    try:
        while waiting or running:
            while waiting and len(running) < count:
                process = waiting.pop(0)
                process.start()
                running.append(process)
            ended = connection.wait([process.sentinel for process in running], max(0.0, until - time.monotonic()))
            if not ended:
                break
            running = [process for process in running if process.sentinel not in ended]
    finally:
        for process in running:
            _end(process)
        for process in running:
            process.join()


def _in_own_group(function: Callable[..., object], job: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # a compiler that the job has started ends with it
    function(*job)


def _end(process: SpawnProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come so far, or has just ended
        process.kill()
