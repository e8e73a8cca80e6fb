"""Gradients smoothed along depth while a digits net trains: what its weights, gradient errors and accuracy become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resode_cuda.smoothness import roughness, smooth_gradients_

from ...harness.models import DigitsNet
from ...harness.tables import Target
from ...sections import digits
from ..digits_errors import errors
from ..experiment import Figures
from ..lab import Lab
from ..options import Options
from ..panels import INK, Panels, error_axis
from ..solvers import SOLVERS

TITLE = "Weights smooth in depth, kept so by smoothed gradients"
MUST_SHOW = (
    "Trained with smooth_gradients_, a net that starts tied keeps weights that are smooth in depth and ends with "
    "smaller gradient errors at the same accuracy; where h = 1 and weights are independent, smoothing does not help."
)
MODES = ("extrapolated + 1", "step + 2")
NETS = {"tied at start, h = 1/N": (True, None), "independent, h = 1": (False, 1.0)}
GAIN, POINTS = 5.0, 1.0
"""The least ratio of gradient errors that counts as a gain, and percentage points of accuracy that may be lost."""


@dataclass(frozen=True)
class Settings:
    steps: int
    epochs: int
    seed: int
    images: int | None
    alphas: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    """0 is no smoothing, the last but one is judged."""
    channels: int = 8


def settings(options: Options) -> Settings:
    if options.quick:
        return Settings(4, 1, options.seed, 320, alphas=(0.0, 0.3, 1.0))
    return Settings(32, 5, options.seed, None)


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [(settings, net, alpha, str(lab.device)) for net in NETS for alpha in settings.alphas]
    return {"alphas": settings.alphas, "runs": lab.results(_trained, jobs)}


def _trained(settings: Settings, kind: str, alpha: float, device: str) -> dict[str, Any]:
    data = digits.load(torch.device(device), settings.images)
    torch.manual_seed(settings.seed)
    net = DigitsNet("euler", settings.steps, settings.channels, *NETS[kind]).to(device)
    stack = net.stack[0]
    fresh = errors(net, data, MODES)
    digits.train(net, "backprop", data, settings.epochs, settings.seed, lambda: smooth_gradients_(stack, alpha))
    return {
        "net": kind,
        "alpha": alpha,
        "accuracy": digits.accuracy(net, data.test_images, data.test_labels),
        "fresh": fresh,
        "trained": errors(net, data, MODES),
        "roughness": max(roughness(stack).values()),
        "entry": [block.get_parameter("0.weight")[0, 0, 1, 1].item() for block in stack],
    }


def _run(figures: Figures, net: str, alpha: float) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in figures["runs"] if (run["net"], run["alpha"]) == (net, alpha))
    return found


def checks(figures: Figures) -> list[Target]:
    tied, ordinary = NETS
    judged = figures["alphas"][-2]
    found = []
    for mode in MODES:
        before, after = (_run(figures, tied, alpha)["trained"][mode] for alpha in (0.0, judged))
        what = f"{tied}, {mode}: error {before:.1e} without, {after:.1e} with α = {judged}, gain"
        found.append(Target(what, before / after, GAIN, at_least=True))
    lost = _run(figures, tied, 0.0)["accuracy"] - _run(figures, tied, judged)["accuracy"]
    found.append(Target(f"{tied}: accuracy lost", lost, POINTS, unit=" points"))
    for mode in MODES:
        before, after = (_run(figures, ordinary, alpha)["trained"][mode] for alpha in (0.0, judged))
        what = f"{ordinary}, {mode}: error {before:.1e} without, {after:.1e} with α = {judged}, gain"
        found.append(Target(what, before / after, GAIN))
    return found


def notes(figures: Figures) -> list[str]:
    shown = [
        f"{net}: "
        + ", ".join(f"{_run(figures, net, alpha)['accuracy']:.1f} % (α = {alpha:g})" for alpha in figures["alphas"])
        for net in NETS
    ]
    return [f"Test accuracy, {'; '.join(shown)}."]


def draw(figures: Figures, path: Path) -> None:
    tied = next(iter(NETS))
    panels = Panels([f"one weight along depth\n{tied}", *NETS], shared=False)
    for alpha, colour in zip(figures["alphas"], ("#000000", "#56B4E9", "#0072B2", "#009E73"), strict=False):
        name = "not smoothed" if not alpha else f"α = {alpha:g}"
        panels.axes[0].plot(_run(figures, tied, alpha)["entry"], color=colour, label=name)
    panels.axes[0].set_xlabel("block n", color=INK)
    panels.axes[0].set_ylabel("centre of the first kernel", color=INK)
    places = range(len(figures["alphas"]))
    for axis, net in zip(panels.axes[1:], NETS, strict=True):
        for mode in MODES:
            of, trained = SOLVERS[mode], [_run(figures, net, alpha)["trained"][mode] for alpha in figures["alphas"]]
            axis.plot(places, trained, color=of.colour, marker=of.marker, label=mode)
            axis.axhline(
                _run(figures, net, 0.0)["fresh"][mode], color=of.colour, linestyle=":", label=f"{mode}, before training"
            )
        axis.set_xticks(list(places), [f"{alpha:g}" for alpha in figures["alphas"]])
        axis.set_xlabel("α, smoothing in depth", color=INK)
        error_axis(axis)
    shown = [error for run in figures["runs"] for state in ("fresh", "trained") for error in map(run[state].get, MODES)]
    for axis in panels.axes[1:]:
        axis.set_ylim(min(shown) / 2, 2 * max(shown))
    panels.axes[1].set_ylabel("relative gradient error", color=INK)
    panels.save(path, columns=4)
