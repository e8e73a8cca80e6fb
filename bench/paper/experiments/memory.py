"""Activation memory of a training step against depth, in the authors' setting: one tied block, 500–8–500, 500 rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode_cuda import ResidualStack

from ...harness.tables import MIB, Target
from ..experiment import Figures
from ..lab import Lab
from ..options import Options
from ..panels import INK, Panels, line
from ..stack_memory import memories

TITLE = "Memory: flat in depth by the adjoint, linear by backprop"
MUST_SHOW = (
    "The adjoint's activation memory is the same at every depth; backprop's grows by the same amount with each step."
)
MODES = ("backprop", "checkpoint", "paper", "corrected", "extrapolated", "stored, 4 bits")
FLAT = ("paper", "corrected", "extrapolated")
TOLERANCE = 1.02


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    dim: int = 500
    hidden: int = 8
    rows: int = 500


def settings(options: Options) -> Settings:
    return Settings((1, 6, 11, 16)) if options.quick else Settings((1, 26, 51, 76, 101, 126, 151))


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [(settings, depth, str(lab.device)) for depth in settings.depths]
    return {"depths": settings.depths, "rows": [row for rows in lab.results(_memories, jobs) for row in rows]}


def _memories(settings: Settings, depth: int, device: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(settings.dim, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, settings.dim))
    stack = ResidualStack([block] * depth, on_drift="ignore").to(device)
    x = torch.rand(settings.rows, settings.dim, device=device)
    return memories(stack, x, MODES, depth)


def _peaks(figures: Figures, mode: str) -> list[int]:
    return [row["peak_bytes"] for row in figures["rows"] if row["mode"] == mode]


def checks(figures: Figures) -> list[Target]:
    # With one step or two there is less to keep and to rebuild.
    found = [
        Target(
            f"{mode}: peak at depth {figures['depths'][-1]} over that at depth {figures['depths'][1]}",
            _peaks(figures, mode)[-1] / _peaks(figures, mode)[1],
            TOLERANCE,
        )
        for mode in FLAT
    ]
    steps = [b - a for a, b in zip(_peaks(figures, "backprop")[1:], _peaks(figures, "backprop")[2:], strict=False)]
    return [
        *found,
        Target("backprop: largest growth between depths over the least", max(steps) / min(steps), TOLERANCE),
    ]


def notes(figures: Figures) -> list[str]:
    peaks = {mode: _peaks(figures, mode)[-1] / MIB for mode in MODES}
    shown = ", ".join(f"{mode} {peak:.1f}" for mode, peak in peaks.items())
    return [f"Peak of a step at depth {figures['depths'][-1]}, MiB by allocator events: {shown}."]


def draw(figures: Figures, path: Path) -> None:
    panels = Panels(["peak of a training step", "held between its forward and backward pass"], shared=False)
    for axis, kind in zip(panels.axes, ("peak_bytes", "held_bytes"), strict=True):
        for mode in MODES:
            sizes = [row[kind] / MIB for row in figures["rows"] if row["mode"] == mode]
            line(axis, mode, figures["depths"], sizes)
        axis.set_xlabel("depth N, steps", color=INK)
    panels.axes[0].set_ylabel("activation memory, MiB", color=INK)
    panels.axes[1].set_yscale("log")  # as the authors draw it; linear growth shows on the left
    panels.axes[1].yaxis.set_major_formatter("{x:g}")
    panels.save(path, columns=3)
