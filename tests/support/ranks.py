"""Processes that compute together over gloo, kept for all tests of a run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
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


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class Ranks:
    """The processes. A job is a function at the top of a module, called with a mesh of the ranks that take part.

    Args:
        folder: for the file through which they find each other.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(MOST):
            end, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, rank, str(folder / "ranks")), daemon=True)
            process.start()
            other.close()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
        """What job(mesh, *args) returns on each of `count` ranks.

        Raises:
            RankError: if a rank raises, dies or takes too long; no rank is of use after the last two.
        """
        ends = self._ends[:count]
        for end in ends:
            end.send((job, args, count))
        found: dict[Connection, Any] = {}
        while len(found) < count:
            ready = wait([end for end in ends if end not in found], SECONDS)
            if not ready:
                self.close()
                raise RankError(f"{count - len(found)} of {count} ranks did not end within {SECONDS} s")
            for end in ready:
                found[end] = end.recv()  # type: ignore[union-attr, index]
        failures = [f"rank {rank}: {found[end][1]}" for rank, end in enumerate(ends) if not found[end][0]]
        if failures:
            raise RankError("\n".join(failures))
        return [found[end][1] for end in ends]

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(end: Connection, rank: int, path: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=MOST, timeout=timedelta(seconds=SECONDS // 2)
    )
    groups = {count: distributed.new_group(range(count)) for count in range(2, MOST + 1)}
    meshes = {count: DeviceMesh.from_group(group, "cpu") for count, group in groups.items() if rank < count}
    with contextlib.suppress(EOFError):
        while True:
            job, args, count = end.recv()
            before = torch.get_default_dtype()
            torch.manual_seed(0)
            try:
                end.send((True, job(meshes[count], *args)))
            except Exception:
                end.send((False, traceback.format_exc()))
            torch.set_default_dtype(before)
