"""Gradient errors of a net trained at one depth and resampled to others, on one batch, in float64.

Deeper nets are the library's `deepen`: functions between two trained ones are interpolated. Shallower ones take the
nearest function before, n ↦ ⌊n · base / N⌋, as the authors' code does at every depth.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resode_cuda import ResidualStack, deepen

from ...harness.gradients import relative_error
from ...harness.models import block_count
from ...harness.modes import SCHEMES
from ...harness.tables import Target
from ..experiment import Figures
from ..lab import Lab
from ..networks import PaperNet
from ..one_stage import OneStage, one_stage
from ..options import Options
from ..panels import INK, Panels, depth_axis, error_axis, line
from ..solvers import SOLVERS
from ..training import loss_of, train

TITLE = "Gradient error against depth, a trained net resampled"
MUST_SHOW = "The deeper the net, the smaller the paper's gradient error, Heun's below Euler's at every depth."
MODES = ("paper", "corrected", "extrapolated", "step + 2", "stored, 8 bits", "stored, 4 bits")


@dataclass(frozen=True)
class Settings:
    net: OneStage
    depths: tuple[int, ...]
    seed: int
    rows: int


def settings(options: Options) -> Settings:
    net = one_stage(options)
    if options.quick:
        net = replace(net, architecture=replace(net.architecture, steps=(4,)))
        return Settings(net, (2, 4, 8), options.seed, 32)
    return Settings(net, (4, 8, 16, 32, 64), options.seed, 256)


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [(settings, scheme, str(lab.device)) for scheme in SCHEMES[::-1]]
    rows = [row for rows in lab.results(_errors, jobs) for row in rows]
    return {"base": settings.net.architecture.steps[0], "depths": settings.depths, "rows": rows}


def _errors(settings: Settings, scheme: str, device: str) -> list[dict[str, Any]]:
    net = replace(settings.net.architecture, scheme=scheme).build(settings.seed).to(torch.device(device))
    images = settings.net.source.load()
    train(net, images, settings.net.recipe, settings.seed)
    net.double()
    inputs, labels = next(images.training(settings.rows, settings.seed))
    batch = inputs.to(device).double(), labels[:, None].to(device)
    found = []
    for depth in settings.depths:
        other = copy.deepcopy(net)
        stack = other.replace_stack(0, resampled(net.stacks[0], depth))
        exact = _gradients(other, batch)
        for mode in MODES:
            SOLVERS[mode].apply(stack)
            got = _gradients(other, batch)
            error = relative_error(list(got.values()), list(exact.values()))
            found.append({"scheme": scheme, "mode": mode, "depth": depth, "error": error})
            if mode == "paper":
                found[-1]["squares"] = [_square(got[name], exact[name]) for name in exact if "bias" not in name]
    return found


def resampled(stack: ResidualStack, depth: int) -> ResidualStack:
    """The stack at another depth, h = 1/N."""
    base = len(stack.steps)
    if depth >= base:
        return deepen(stack, depth)
    places = [n * base // depth for n in range(block_count(stack.scheme, depth))]
    return ResidualStack([copy.deepcopy(stack[place]) for place in places], **{**stack.settings(), "step": None})


def _gradients(net: PaperNet, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of the residual functions' parameters by name."""
    parameters = dict(net.stacks[0].named_parameters())
    found = torch.autograd.grad(loss_of(net(batch[0]), batch[1]), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def _square(got: Tensor, exact: Tensor) -> float:
    """The authors' measure, |got − exact|² / |exact|² of one tensor."""
    return relative_error([got], [exact]) ** 2


def _series(figures: Figures, scheme: str, mode: str) -> list[float]:
    rows = [row for row in figures["rows"] if (row["scheme"], row["mode"]) == (scheme, mode)]
    return [row["error"] for row in sorted(rows, key=lambda row: row["depth"])]


def checks(figures: Figures) -> list[Target]:
    found = []
    for scheme in SCHEMES:
        errors = _series(figures, scheme, "paper")
        worst = max(b / a for a, b in itertools.pairwise(errors))
        found.append(
            Target(f"paper, {scheme.capitalize()}: error at twice the depth over that before, worst", worst, 1)
        )
    ratios = [h / e for h, e in zip(*(_series(figures, s, "paper") for s in ("heun", "euler")), strict=True)]
    found.append(Target("paper: Heun's error over Euler's, worst depth", max(ratios), 1))
    for mode in MODES[1:]:
        ends = [(errors[-1] / errors[0]) for errors in (_series(figures, scheme, mode) for scheme in SCHEMES)]
        depths = f"N = {figures['depths'][-1]} over N = {figures['depths'][0]}"
        found.append(Target(f"{mode}: error at {depths}, worse scheme", max(ends), 1))
    return found


def notes(figures: Figures) -> list[str]:
    return [
        f"Trained at depth {figures['base']}; deeper nets are interpolated (deepen), shallower ones take each 2nd, "
        "4th or 8th function. Right: the authors' measure, the squared relative error of each weight tensor, biases "
        "left out, by the paper's solver; a dot is a tensor, a bar the median."
    ]


def draw(figures: Figures, path: Path) -> None:
    panels = Panels([*(f"{scheme.capitalize()}, all parameters" for scheme in SCHEMES), "paper, squared, each tensor"])
    depths = figures["depths"]
    for axis, scheme in zip(panels.axes, SCHEMES, strict=False):
        for mode in MODES:
            line(axis, mode, depths, _series(figures, scheme, mode))
    for axis in panels.axes:
        depth_axis(axis, depths)
        error_axis(axis)
    for side, (scheme, colour) in enumerate(zip(SCHEMES, ("#0072B2", "#D55E00"), strict=True)):
        for row in figures["rows"]:
            if (row["scheme"], row["mode"]) == (scheme, "paper"):
                squares = sorted(row["squares"])
                # Spread to one side of the depth, which is logarithmic.
                spread = [
                    row["depth"] * 2 ** ((2 * side - 1) * (0.08 + 0.25 * n / len(squares))) for n in range(len(squares))
                ]
                panels.axes[2].plot(spread, squares, ".", color=colour, markersize=3, alpha=0.6)
                panels.axes[2].plot(
                    [spread[0], spread[-1]],
                    [statistics.median(squares)] * 2,
                    color=colour,
                    linewidth=2,
                    label=f"{scheme.capitalize()}, median tensor",
                )
    panels.axes[0].set_ylabel("relative gradient error", color=INK)
    panels.save(path, columns=4)
