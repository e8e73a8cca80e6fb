"""What the backward passes cost beside checkpointing each layer by `torch.utils.checkpoint`, which evaluates blocks as
often: on the reference job, and on blocks so small that only Python is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack, Reverse

from ..harness.tables import Table, Target, relative_time
from ..harness.timing import Spread, interleaved, ratios, spread
from ..options import Options

BASELINE = "torch checkpoint"
SOLVERS: dict[str, str | Reverse] = {
    "extrapolated": "extrapolated",
    "corrected": "corrected",
    "stored, 8 bits": "stored",
    "stored, 4 bits": Reverse("stored", bits=4),
}
ROUNDS = 10
MOST_MICROSECONDS = 300
MOST_OF_CHECKPOINT = {"extrapolated": 1.02, "stored, 8 bits": 1.10, "stored, 4 bits": 1.15}


@dataclass(frozen=True)
class Job:
    steps: int
    dim: int
    rows: int
    threads: int | None
    """None takes torch's own choice."""


JOBS = {"reference": Job(64, 128, 2048, None), "tiny": Job(256, 8, 16, 1)}


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    jobs = {name: Job(4, 8, 16, job.threads) if options.quick else job for name, job in JOBS.items()}
    task = progress.add_task("overhead", total=len(jobs))
    found = []
    for name, job in jobs.items():
        with _threads(job.threads):
            seconds = _measured(job, 2 if options.quick else ROUNDS, options.seed, device)
        progress.advance(task)
        found += [
            {
                "job": name,
                **asdict(job),
                "mode": mode,
                "seconds": times,
                "microseconds_a_step": asdict(spread([1e6 * time / job.steps for time in times])),
                "of_checkpoint": asdict(ratios(times, seconds[BASELINE])),
            }
            for mode, times in seconds.items()
        ]
    return {"rows": found}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(job: Job, rounds: int, seed: int, device: torch.device) -> dict[str, list[float]]:
    torch.manual_seed(seed)
    dim = job.dim
    blocks = [nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim)) for _ in range(job.steps)]
    x = torch.randn(job.rows, dim, device=device, requires_grad=True)

    def plain(x: Tensor, evaluate: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        for block in modules:
            x = x + evaluate(block, x) / job.steps
        return x

    modules = nn.ModuleList(copy.deepcopy(blocks)).to(device)
    forwards: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(x, lambda block, x: block(x)),
        BASELINE: lambda: plain(x, lambda block, x: checkpoint(block, x, use_reentrant=False)),
    }
    for mode, solver in SOLVERS.items():
        forwards[mode] = _forward(ResidualStack(copy.deepcopy(blocks), reverse=solver).to(device), x)
    forwards["our checkpoint"] = _forward(ResidualStack(copy.deepcopy(blocks), gradient="checkpoint").to(device), x)
    return interleaved({mode: _step(forward) for mode, forward in forwards.items()}, rounds, device)


def _forward(stack: ResidualStack, x: Tensor) -> Callable[[], Tensor]:
    return lambda: stack(x)


def _step(forward: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: forward().square().mean().backward()


def tables(figures: dict[str, Any]) -> list[Table]:
    table = Table(
        "Overhead: a training step beside checkpointing each layer",
        ["job", "backward", "µs a step of the stack", "time"],
        note="Time relative to torch.utils.checkpoint's in the same round: median ± half the distance of quartiles. "
        "Reference: 64 steps of MLP blocks of 128, 2,048 rows. Tiny: 256 steps, 8 wide, 16 rows, one thread.",
    )
    for row in figures["rows"]:
        shown = f"{row['microseconds_a_step']['median']:.0f}", relative_time(Spread(**row["of_checkpoint"]))
        table.rows.append((row["job"], row["mode"], *shown))
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    found = []
    for row in figures["rows"]:
        if row["job"] == "tiny" and row["mode"] in ("extrapolated", "corrected"):
            what = f"overhead, tiny blocks, {row['mode']}: a step"
            found.append(Target(what, row["microseconds_a_step"]["median"], MOST_MICROSECONDS, unit=" µs"))
        if row["job"] == "reference" and row["mode"] in MOST_OF_CHECKPOINT:
            what, limit = f"overhead, reference job, {row['mode']}: relative time", MOST_OF_CHECKPOINT[row["mode"]]
            found.append(Target(what, row["of_checkpoint"]["median"], limit))
    return found


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []
