"""A training that keeps checkpoints, dies in the middle of a backward pass, and starts again on any number of ranks.

Each rank is a process of its own, forked from a server that has imported torch already.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import uuid
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resode_cuda import ResidualStack, calibrate, recalibration
from tests.support.ranks import forking

DIM, ROWS, BLOCKS = 6, 12, 4
STEPS, EVERY = 7, 2
"""Training steps, and those from one checkpoint to the next."""
SECONDS = 60

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
}


class Training(NamedTuple):
    """How to train. All of it is the same when the training is started again, but the ranks and its death."""

    folder: Path
    """Has its checkpoints and its log."""
    way: str = "alone"
    """"alone", "ddp" or "fsdp"."""
    ranks: int = 1
    options: dict[str, Any] | None = None
    """The stack's."""
    optimizer: str = "adam"
    tolerance: float | None = None
    """A plan's, made for the stack before the first step."""
    recalibrates: int = 0
    """Steps from one calibration to the next."""
    dies_at: int | None = None
    """The step in whose backward pass the last rank dies."""


class Now(NamedTuple):
    """The step that a process is at."""

    step: int
    dies_at: int | None


now = Now(0, None)


class Mortal(nn.Module):
    """A block in which the process dies when it is run again in the backward pass, if it is time to."""

    def __init__(self, dies: bool) -> None:
        super().__init__()
        self.dies = dies
        self.inner = nn.Sequential(nn.Linear(DIM, 10), nn.Tanh(), nn.Linear(10, DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.dies and now.step == now.dies_at and torch._C._current_graph_task_id() != -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)


class Model(nn.Module):
    """A stack between two layers."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)
        self.stack = ResidualStack([Mortal(index == 1) for index in range(BLOCKS)], **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stack(self.first(x)))


def batch(step: int) -> Tensor:
    """The rows of all ranks, each larger than the one before: the ranks' stacks have different defects."""
    rows = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(step))
    return rows * torch.linspace(0.5, 2.0, ROWS)[:, None]


def train(rank: int, training: Training, meeting: str) -> None:
    """What one process does.

    Args:
        meeting: a file through which the ranks find each other.
    """
    global now
    sys.stderr = (training.folder / f"errors of rank {rank}").open("a")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    if training.way != "alone":
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=training.ranks,
            timeout=timedelta(seconds=SECONDS // 2),
        )
    model = Model(training.options or {})
    begin = newest(training.folder)
    if training.tolerance is not None and begin == 0:
        # Before parameters are sharded, and on the same rows everywhere: all ranks find the same plan.
        model.stack.apply_plan(calibrate(model.stack, batch(0), tolerance=training.tolerance))
    if training.recalibrates:
        # A clock that counts its calls: whether a calibration is due must not depend on how busy the machine is.
        recalibration.time = SimpleNamespace(perf_counter=itertools.count().__next__)  # type: ignore[assignment]
        group = distributed.group.WORLD if training.way == "ddp" else None
        model.stack.recalibrate_every(training.recalibrates, share=1.0, group=group)
    parallel: Any = model
    if training.way == "ddp":
        parallel = DistributedDataParallel(model)
    elif training.way == "fsdp":
        for block in model.stack:
            fully_shard(block)
        fully_shard(model)
    run = Resumable(model, OPTIMIZERS[training.optimizer](model.parameters()), training, rank)
    if begin:
        run.load(begin)
    for step in range(begin, STEPS):
        if step > begin and step % EVERY == 0:
            run.save(step)
        now = Now(step, training.dies_at if rank == training.ranks - 1 else None)
        squares = parallel(batch(step).chunk(training.ranks)[rank]).square().sum() / ROWS
        run.optimizer.zero_grad()
        (squares * training.ranks).backward()  # gradients are averaged over the ranks
        run.optimizer.step()
        run.log(step, squares.detach())


class Resumable(Stateful):
    """What a checkpoint holds.

    Drift is judged by each rank from its own rows, so every rank has a training state of its own. They are kept
    together, as one string: a checkpoint of all ranks holds each other value once, from whichever rank.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, training: Training, rank: int) -> None:
        self.model, self.optimizer, self.training, self.rank = model, optimizer, training, rank

    def state_dict(self) -> dict[str, Any]:
        if self.training.way == "fsdp":
            weights, moments = get_state_dict(self.model, self.optimizer)
        else:
            weights, moments = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": weights, "optimizer": moments, "training": json.dumps(self._of_all_ranks())}

    def _of_all_ranks(self) -> list[Any]:
        mine = self.model.stack.training_state()
        if self.training.way == "alone":
            return [mine]
        found: list[Any] = [None] * self.training.ranks
        distributed.all_gather_object(found, mine)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.training.way == "fsdp":
            weights, moments = state["model"], state["optimizer"]
            set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        kept = json.loads(state["training"])
        self.model.stack.load_training_state(kept[self.rank % len(kept)])

    def save(self, step: int) -> None:
        path = self.training.folder / f"step {step}"
        if self.training.way == "fsdp":
            dcp.save({"app": self}, checkpoint_id=path)
            return
        state = self.state_dict()
        if self.rank == 0:
            part = path.with_suffix(".part")
            torch.save(state, part)
            part.rename(path)  # a process that dies before leaves no half of a checkpoint

    def load(self, step: int) -> None:
        path = self.training.folder / f"step {step}"
        if self.training.way == "fsdp":
            dcp.load({"app": self}, checkpoint_id=path)
        else:
            self.load_state_dict(torch.load(path, weights_only=True))

    def log(self, step: int, squares: Tensor) -> None:
        """Write down the loss, to the last bit, and how this rank's stack trains by now."""
        if self.training.way != "alone":
            distributed.all_reduce(squares)
        state = self.model.stack.training_state()
        state["recalibration"] = {key: value for key, value in state["recalibration"].items() if "seconds" not in key}
        with (self.training.folder / f"log of rank {self.rank}").open("a") as file:
            file.write(json.dumps({"step": step, "loss": squares.item(), "training": state}) + "\n")


def newest(folder: Path) -> int:
    """The step of the last checkpoint that is whole; 0 where there is none."""
    paths = [path for path in folder.glob("step *") if not path.suffix]
    # `dcp.save` writes `.metadata` when all else is there.
    whole = [path for path in paths if path.is_file() or (path / ".metadata").exists()]
    return max((int(path.name.split()[1]) for path in whole), default=0)


def launch(training: Training) -> list[int | None]:
    """Train, in as many processes as there are ranks. Where one dies the others are killed, as torchrun does it.

    Returns:
        the exit code of each rank.
    """
    training.folder.mkdir(parents=True, exist_ok=True)
    context = forking()
    meeting = str(training.folder / uuid.uuid4().hex)
    ranks = [context.Process(target=train, args=(rank, training, meeting)) for rank in range(training.ranks)]
    for process in ranks:
        process.start()
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running), SECONDS)]  # type: ignore[call-overload]
        if not ended or any(_exit_code(process) for process in ended):
            for process in running.values():
                process.kill()
    return [_exit_code(process) for process in ranks]


def _exit_code(process: Any) -> int | None:
    process.join()
    return process.exitcode


def log_of(training: Training, rank: int = 0) -> dict[int, dict[str, Any]]:
    """What a rank wrote down, by step."""
    lines = (training.folder / f"log of rank {rank}").read_text().splitlines()
    return {entry.pop("step"): entry for entry in map(json.loads, lines)}
