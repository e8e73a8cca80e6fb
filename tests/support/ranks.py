"""Processes that compute together over gloo, kept for all tests of a run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

MOST = 3
SECONDS = 120
"""After which a job of all ranks counts as hung; gloo's own time-out is half of it."""


PRELOADED = (
    *("torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("tests.support.sharded", "tests.support.resumable"),
)
"""What the process has imported that new ones are forked from."""


def forking() -> Any:
    """A context whose processes are forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class Ranks:
    """The processes. A job is a function at the top of a module, called with a mesh of the ranks that take part.

    Args:
        folder: for the file through which they find each other.
        most: how many there are.
        seconds: after which a job of all ranks counts as hung; gloo's own time-out is half of it.
    """

    def __init__(self, folder: Path, most: int = MOST, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        context = forking()
        self._ends, self._processes = [], []
        timeout = timedelta(seconds=seconds // 2)
        for rank in range(most):
            end, other = context.Pipe()
            process = context.Process(
                target=_serve, args=(other, rank, most, str(folder / "ranks"), timeout), daemon=True
            )
            process.start()
            other.close()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
        """What job(mesh, *args) returns on each of `count` ranks.

        Raises:
            RankError: if a rank raises, dies or takes too long; no rank is of use after the last two.
        """
        outcomes = self.outcomes(job, *args, ranks=range(count))
        failures = [f"rank {rank}: {found}" for rank, (is_done, found) in enumerate(outcomes) if not is_done]
        if failures:
            raise RankError("\n".join(failures))
        return [found for _, found in outcomes]

    def outcomes(self, job: Callable[..., Any], *args: Any, ranks: Sequence[int]) -> list[tuple[bool, Any]]:
        """For each of these ranks whether job(mesh, *args) has returned, and what; else its traceback, or "died".

        The mesh is that of as many ranks as these are, from the first one on; None for a rank that is not in it.

        Raises:
            RankError: if a rank takes too long; no rank is of use after that.
        """
        ends = [self._ends[rank] for rank in ranks]
        for end in ends:
            end.send((job, args, len(ends)))
        found: dict[Connection, Any] = {}
        while len(found) < len(ends):
            ready = wait([end for end in ends if end not in found], self._seconds)
            if not ready:
                self.close()
                raise RankError(f"{len(ends) - len(found)} of {len(ends)} ranks did not end within {self._seconds} s")
            for end in ready:
                try:
                    found[end] = end.recv()  # type: ignore[union-attr, index]
                except EOFError:
                    found[end] = False, "died"  # type: ignore[index]
        return [found[end] for end in ends]

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(end: Connection, rank: int, most: int, path: str, timeout: timedelta) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=most, timeout=timeout)
    groups = {count: distributed.new_group(range(count)) for count in range(2, most + 1)}
    meshes = {count: DeviceMesh.from_group(group, "cpu") for count, group in groups.items() if rank < count}
    with contextlib.suppress(EOFError):
        while True:
            job, args, count = end.recv()
            before = torch.get_default_dtype()
            torch.manual_seed(0)
            try:
                end.send((True, job(meshes.get(count), *args)))
            except Exception:
                end.send((False, traceback.format_exc()))
            torch.set_default_dtype(before)
