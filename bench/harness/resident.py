"""Resident growth of a fresh process over one training step: what the operating system sees on a CPU.

Resident size misleads where freed memory stays with the process, so the measuring processes run with a malloc that
maps every block of 64 KiB or more by itself and gives it back when it is freed. One process imports torch and has a
child for each measurement, since the import takes far longer than the step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .workload import Workload

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """A step to measure. build: makes the workload of its arguments, a function that another process can import."""

    build: Callable[..., Workload]
    arguments: dict[str, Any]
    mode: str


def growth(jobs: Sequence[Job], device: torch.device) -> Sequence[int | None]:
    """Bytes by which each job's step makes a process grow at most; None on a GPU and where /proc does not tell."""
    if device.type != "cpu" or not os.access(_CLEAR, os.W_OK):
        return [None] * len(jobs)
    # Two processes at a time, with one thread each, where torch may use as many.
    count = min(2, torch.get_num_threads())
    with ThreadPoolExecutor(count) as pool:
        grown = list(pool.map(_growth_elsewhere, (jobs[part::count] for part in range(count))))
    return [grown[index % count][index // count] for index in range(len(jobs))]


def _growth_elsewhere(jobs: Sequence[Job]) -> list[int]:
    measured = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps(jobs),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        # OpenBLAS would start threads when it is imported, and a process with threads is not safe to fork.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    )
    if measured.returncode:
        written = measured.stderr.decode(errors="replace")
        raise RuntimeError(f"bench.resident: the measuring process must end well, but wrote\n{written}")
    return json.loads(measured.stdout)


def _growth_here(job: Job) -> int:
    workload = job.build(**job.arguments)
    # Code that is paged in, threads and buffers that stay are no part of a step.
    workload.step(job.mode)
    _CLEAR.write_text("5")  # the peak of the resident size starts afresh
    before = _status("VmRSS")
    workload.step(job.mode)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"bench.resident: {_STATUS} must have a line {field}, but has none")
    return 1024 * int(found[1])


def _in_child(job: Job) -> int:
    def send(connection: Connection) -> None:
        connection.send(_growth_here(job))

    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=send, args=(sending,))
    child.start()
    sending.close()  # so that a child that dies ends the wait
    try:
        return receiving.recv()
    finally:
        child.join()


if __name__ == "__main__":
    import torch.fx.experimental.symbolic_shapes  # as each child's first backward pass would, which takes longer

    print(json.dumps([_in_child(job) for job in pickle.load(sys.stdin.buffer)]))
