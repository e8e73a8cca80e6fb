"""An ordinary network, h = 1 and independent weights: the paper's solver diverges there, stored increments train."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resode_cuda import calibrate

from ...harness.gradients import relative_error
from ...harness.tables import Target
from ..data import Images, Source
from ..experiment import Figures
from ..lab import Lab
from ..networks import Architecture, PaperNet
from ..options import Options
from ..panels import INK, Panels, error_axis, line, percent_axis
from ..solvers import SOLVERS
from ..training import Recipe, loss_of, side_by_side, test_errors, train

TITLE = "Where the adjoint fails: an ordinary network, h = 1"
MUST_SHOW = (
    "The paper's solver takes gradients that are wrong altogether and ends far from backprop; increments stored in 8 "
    "or 2 bits, and checkpointing, train as backprop does. calibrate chooses one of these."
)
MODES = ("backprop", "checkpoint", "stored, 8 bits", "stored, 2 bits", "paper")
LARGEST = 1e3
"""What relative errors are cut off at."""
WORSE, ALIKE = 5.0, 1.0
"""Percentage points of test error that count as failed, and as alike."""


@dataclass(frozen=True)
class Settings:
    source: Source
    architecture: Architecture
    recipe: Recipe
    stage: int
    """The one whose gradients are taken by each solver."""
    rows: int
    seed: int


def settings(options: Options) -> Settings:
    drops = (1 / 3, 2 / 3)
    if options.imagenet:
        net = Architecture(
            3,
            1000,
            (256, 512, 1024, 2048),
            (3, 4, 23, 3),
            stem=(7, 2),
            pooled=1,
            step=1.0,
            last_norm="one",
            bottleneck=True,
        )
        recipe = Recipe(90, 256, 0.1, drops, weight_decay=1e-4)
        return Settings(Source("imagenet", str(options.imagenet)), net, recipe, 2, 64, options.seed)
    net = Architecture(1, 10, (16,), (32,), stem=(3, 1), step=1.0, last_norm="one", copies=3)
    recipe = Recipe(8, 64, 1e-2, cosine=True, adam=True)
    if options.quick:
        net, recipe = replace(net, widths=(4,), steps=(4,), copies=2), replace(recipe, epochs=1, rows=256)
    return Settings(Source(), net, recipe, 0, 64, options.seed)


def measure(settings: Settings, lab: Lab) -> Figures:
    runs = lab.results(_trained, [(settings, mode, str(lab.device)) for mode in MODES])
    return {"steps": settings.architecture.steps[settings.stage], "runs": runs}


def _trained(settings: Settings, mode: str, device: str) -> dict[str, Any]:
    net, images = settings.architecture.build(settings.seed).to(torch.device(device)), settings.source.load()
    found: dict[str, Any] = {"mode": mode, "errors": [], "gradient_errors": []}

    def judge(epoch: int) -> None:
        found["errors"].append(test_errors(net, images))
        found["gradient_errors"].append(_gradient_error(net, mode, settings, images))

    SOLVERS[mode].apply(net.stacks[settings.stage])
    judge(-1)
    train(net, images, settings.recipe, settings.seed, judge)
    if mode == "backprop":
        found["plan"] = _plan(net, settings, images)
    return found


def _batch(net: PaperNet, settings: Settings, images: Images) -> tuple[Tensor, Tensor]:
    batch = next(images.training(settings.rows, settings.seed))
    return side_by_side((batch,) * net.copies, next(net.parameters()).device)


def _gradient_error(net: PaperNet, mode: str, settings: Settings, images: Images) -> float:
    """Relative error of the stage's gradients on one batch, in float64."""
    wide = copy.deepcopy(net).double()
    stack, (inputs, labels) = wide.stacks[settings.stage], _batch(net, settings, images)
    found = []
    for solver in ("backprop", mode):
        SOLVERS[solver].apply(stack)
        loss = loss_of(wide(inputs.double()), labels)
        found.append(torch.autograd.grad(loss, list(stack.parameters())))
    error = relative_error(found[1], found[0])
    return min(error, LARGEST) if math.isfinite(error) else LARGEST


def _plan(net: PaperNet, settings: Settings, images: Images) -> dict[str, Any]:
    """What calibrate chooses for the trained stage, at the tolerance that autocast would cost anyway."""
    stack, (inputs, labels) = net.stacks[settings.stage], _batch(net, settings, images)
    layers = list(net)
    place = next(index for index, layer in enumerate(layers) if layer is stack)
    with torch.no_grad():
        x = nn.Sequential(*layers[:place])(inputs)
    rest = nn.Sequential(*layers[place + 1 :])
    plan = calibrate(
        stack, x, tolerance="amp", loss=lambda out: loss_of(rest(out).view(len(labels), net.copies, -1), labels)
    )
    chosen = plan.candidates[-1]
    exact_or_stored = chosen.reverse is None or chosen.reverse.is_stored
    return {
        "tolerance": plan.tolerance,
        "chosen": str(chosen),
        "error": chosen.error,
        "fits": exact_or_stored,
        "told": str(plan),
    }


def _last(figures: Figures, mode: str) -> float:
    run = next(run for run in figures["runs"] if run["mode"] == mode)
    return statistics.median(run["errors"][-1])


def _plan_of(figures: Figures) -> dict[str, Any]:
    plan: dict[str, Any] = next(run["plan"] for run in figures["runs"] if "plan" in run)
    return plan


def checks(figures: Figures) -> list[Target]:
    exact = _last(figures, "backprop")
    worst = max(next(run for run in figures["runs"] if run["mode"] == "paper")["gradient_errors"])
    found = [
        Target("paper: test error above backprop's", _last(figures, "paper") - exact, WORSE, True, " points"),
        Target("paper: largest relative gradient error", worst, 1, True),
    ]
    for mode in MODES[1:-1]:
        found.append(
            Target(f"{mode}: test error above backprop's", _last(figures, mode) - exact, ALIKE, unit=" points")
        )
    plan = _plan_of(figures)
    return [*found, Target(f"calibrate chooses stored bits or checkpointing ({plan['chosen']})", plan["fits"], 1, True)]


def notes(figures: Figures) -> list[str]:
    plan = _plan_of(figures)
    errors = ", ".join(f"{mode} {_last(figures, mode):.1f}" for mode in MODES)
    return [
        f"Median test error in percent: {errors}.",
        f"calibrate, for the trained net and autocast's own error of {plan['tolerance']:.1e}, chooses: "
        f"{plan['chosen']}; error {plan['error']:.1e}.",
    ]


def draw(figures: Figures, path: Path) -> None:
    panels = Panels(["test error (median, least to largest)", "gradient error of each training's solver"], shared=False)
    left, right = panels.axes
    for run in figures["runs"]:
        epochs = range(len(run["errors"]))
        line(left, run["mode"], epochs, [statistics.median(errors) for errors in run["errors"]])
        bounds = [min(errors) for errors in run["errors"]], [max(errors) for errors in run["errors"]]
        left.fill_between(epochs, *bounds, color=SOLVERS[run["mode"]].colour, alpha=0.12, linewidth=0)
        if any(run["gradient_errors"]):
            line(right, run["mode"], epochs, [error or math.nan for error in run["gradient_errors"]])
    right.axhline(1, color=INK, linestyle="--", linewidth=1)
    right.annotate("as large as the gradient", (3, 1), (0, -12), textcoords="offset points", color=INK, fontsize=9)
    percent_axis(left, "test error, %")
    error_axis(right, "relative gradient error")
    for axis in panels.axes:
        axis.set_xlabel("epoch", color=INK)
    panels.save(path)
