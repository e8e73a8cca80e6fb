"""A net of tied stages, trained exactly, then untied, and one deep stage fine-tuned by the adjoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import nn

from ...harness.tables import MIB, Target
from ..data import Source
from ..experiment import Figures
from ..lab import Lab
from ..networks import Architecture, PaperNet
from ..options import Options
from ..panels import INK, Panels, depth_axis, line, percent_axis
from ..solvers import SOLVERS
from ..stack_memory import memories
from ..training import Recipe, test_errors, train

TITLE = "Untie and refine: a deep stage fine-tuned without its states"
MUST_SHOW = (
    "Fine-tuned by the adjoint, the untied net ends with no larger test error than the tied one, as by backprop; the "
    "stage's activation memory is the same at every depth."
)
MODES = ("backprop", "paper", "corrected")
SIDE, ROWS = 8, 64
"""States whose memory is measured."""
TOLERANCE = 1.02


@dataclass(frozen=True)
class Settings:
    source: Source
    architecture: Architecture
    stage: int
    tied: Recipe
    fine: Recipe
    depths: tuple[int, ...]
    """Those at which the stage's memory is measured."""
    seed: int


def settings(options: Options) -> Settings:
    depths = (8, 16, 32, 64, 128)
    widths = (256, 512, 1024, 2048)
    if options.imagenet:
        net = Architecture(3, 1000, widths, (64,) * 4, stem=(7, 2), pooled=1, tied=True, bottleneck=True)
        tied = Recipe(102, 256, 0.1, (1 / 3, 2 / 3), weight_decay=1e-4)
        fine = Recipe(16, 256, 5e-4, (5 / 16, 10 / 16, 15 / 16), divisor=3.0, weight_decay=1e-4)
        return Settings(Source("imagenet", str(options.imagenet)), net, 2, tied, fine, depths, options.seed)
    if options.cifar10:
        net = Architecture(3, 10, widths, (4, 4, 32, 4), stem=(3, 1), pooled=1, tied=True, bottleneck=True)
        tied, fine = Recipe(200, 128, 0.1, cosine=True, weight_decay=5e-4), Recipe(50, 128, 1e-3, (0.8,))
        return Settings(Source("cifar10", str(options.cifar10)), net, 2, tied, fine, depths, options.seed)
    if options.quick:
        net = Architecture(1, 10, (4, 4), (2, 4), tied=True, last_norm="one", stem=(3, 1))
        return Settings(Source(), net, 1, Recipe(1, 256, 0.1), Recipe(1, 256, 1e-3), (2, 4, 8), options.seed)
    net = Architecture(1, 10, (8, 16), (2, 16), tied=True, last_norm="one", stem=(3, 1))
    tied, fine = Recipe(12, 64, 0.05, cosine=True, weight_decay=5e-4), Recipe(8, 64, 1e-2, (0.8,))
    return Settings(Source(), net, 1, tied, fine, depths, options.seed)


def measure(settings: Settings, lab: Lab) -> Figures:
    (errors,) = lab.results(_refined, [(settings, str(lab.device))])
    jobs = [(settings.architecture, settings.stage, depth, str(lab.device)) for depth in settings.depths]
    rows = [row for rows in lab.results(_memories, jobs) for row in rows]
    return {"steps": settings.architecture.steps, "errors": errors, "depths": settings.depths, "rows": rows}


def _refined(settings: Settings, device: str) -> dict[str, list[float]]:
    """Test errors in percent: of the tied net after each epoch, and of the untied one before and in its fine-tuning."""
    net, images = settings.architecture.build(settings.seed).to(torch.device(device)), settings.source.load()
    found: dict[str, list[float]] = {"tied": []}
    train(net, images, settings.tied, settings.seed, lambda _: found["tied"].extend(test_errors(net, images)))
    for mode in MODES:
        other = copy.deepcopy(net)
        stack = other.untie(settings.stage)
        SOLVERS[mode].apply(stack)
        _freeze_but(other, stack)
        found[mode] = test_errors(other, images)
        train(other, images, settings.fine, settings.seed, partial(_judge, other, images, found[mode]))
    return found


def _judge(net: PaperNet, images: Any, errors: list[float], epoch: int) -> None:
    errors += test_errors(net, images)


def _freeze_but(net: PaperNet, stack: nn.Module) -> None:
    """Train the stack alone; norms elsewhere keep their statistics."""
    net.requires_grad_(False).eval()
    stack.requires_grad_(True).train()


def _memories(architecture: Architecture, stage: int, depth: int, device: str) -> list[dict[str, Any]]:
    steps = tuple(depth if at == stage else 1 for at in range(len(architecture.steps)))
    stack = replace(architecture, steps=steps).build(0).untie(stage).to(torch.device(device))
    x = torch.randn(ROWS, architecture.widths[stage], SIDE, SIDE, device=device)
    return memories(stack, x, MODES, depth)


def _bytes(figures: Figures, mode: str, kind: str) -> list[int]:
    return [row[kind] for row in figures["rows"] if row["mode"] == mode]


def checks(figures: Figures) -> list[Target]:
    errors = figures["errors"]
    found = [
        Target(
            f"{mode}: test error at the end less that of the tied net",
            errors[mode][-1] - errors[mode][0],
            0,
            unit=" points",
        )
        for mode in MODES
    ]
    for mode in MODES[1:]:
        for kind in ("peak", "held"):
            sizes = _bytes(figures, mode, f"{kind}_bytes")
            what = f"{mode}: memory {kind} at depth {figures['depths'][-1]} over that at {figures['depths'][0]}"
            found.append(Target(what, sizes[-1] / sizes[0], TOLERANCE))
    return found


def notes(figures: Figures) -> list[str]:
    errors = figures["errors"]
    ends = ", ".join(f"{mode} {errors[mode][-1]:.2f}" for mode in MODES)
    return [f"Test error in percent: tied {errors['tied'][-1]:.2f}; fine-tuned by {ends}."]


def draw(figures: Figures, path: Path) -> None:
    panels, errors = Panels(["test error", "activation memory of the stage, one step"], shared=False), figures["errors"]
    left, right = panels.axes
    begin = len(errors["tied"])
    left.plot(range(1, begin + 1), errors["tied"], color=INK, linestyle=":", label="tied, backprop")
    for mode in MODES:
        # Backprop's and the adjoint's errors may be the same: markers of three sizes stay in sight.
        epochs = range(begin, begin + len(errors[mode]))
        line(left, mode, epochs, errors[mode], markersize=10 - 3 * MODES.index(mode))
        for kind, dashes in (("peak", "-"), ("held", "--")):
            sizes = [size / MIB for size in _bytes(figures, mode, f"{kind}_bytes")]
            line(right, mode, figures["depths"], sizes, linestyle=dashes, label=mode if kind == "peak" else None)
    left.axvline(begin, color=INK, linewidth=0.8)
    left.annotate(
        "untied", (begin, 0.97), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=9
    )
    percent_axis(left, "test error, %")
    left.set_xlabel("epoch", color=INK)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    depth_axis(right, figures["depths"], "depth N of the stage (solid: peak, dashed: held)")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("MiB over what was allocated before", color=INK)
    panels.save(path)
