"""How many bits a value must be stored, against depth, for gradients as good as bfloat16 autocast leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...harness.models import DigitsNet
from ...harness.tables import Target
from ...sections import digits
from ..digits_errors import errors
from ..experiment import Figures
from ..lab import Lab
from ..options import Options
from ..panels import INK, Panels, depth_axis, error_axis, line

TITLE = "Beyond the paper: bits to store against depth, h = 1/N"
MUST_SHOW = (
    "Which solvers stay below the gradient error of bfloat16 autocast itself, at which depths, before and after "
    "training: the deeper the net, the fewer bits it needs, down to none."
)
NOTHING = ("corrected", "extrapolated", "extrapolated + 1", "step + 2")
BITS = ("stored, 2 bits", "stored, 4 bits", "stored, 8 bits")
STATES = ("fresh", "trained")


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    epochs: int
    seed: int
    images: int | None
    channels: int = 8


def settings(options: Options) -> Settings:
    if options.quick:
        return Settings((2, 4), 1, options.seed, 320)
    return Settings((4, 8, 16, 32, 64, 128), 5, options.seed, None)


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [(settings, depth, str(lab.device)) for depth in settings.depths[::-1]]
    return {"depths": settings.depths, "rows": lab.results(_errors, jobs)[::-1]}


def _errors(settings: Settings, depth: int, device: str) -> dict[str, Any]:
    data = digits.load(torch.device(device), settings.images)
    torch.manual_seed(settings.seed)
    net = DigitsNet("euler", depth, settings.channels).to(device)
    found: dict[str, Any] = {"depth": depth, "fresh": errors(net, data, NOTHING + BITS)}
    digits.train(net, "backprop", data, settings.epochs, settings.seed)
    found["trained"] = errors(net, data, NOTHING + BITS)
    found["accuracy"] = digits.accuracy(net, data.test_images, data.test_labels)
    return found


def _sufficient(figures: Figures, state: str, mode: str) -> float:
    """The depth from which on a solver's error is below autocast's; infinite if there is none."""
    enough = [row[state][mode] <= row[state]["autocast"] for row in figures["rows"]]
    return min((depth for at, depth in enumerate(figures["depths"]) if all(enough[at:])), default=float("inf"))


def checks(figures: Figures) -> list[Target]:
    deepest = figures["depths"][-1]
    fewest = min(_sufficient(figures, "trained", mode) for mode in NOTHING)
    found = [Target("trained: depth from which on some solver needs nothing stored", fewest, deepest)]
    return found + [
        Target(f"trained, {mode}: depth from which on they suffice", _sufficient(figures, "trained", mode), deepest)
        for mode in BITS
    ]


def notes(figures: Figures) -> list[str]:
    found = []
    for state in STATES:
        depths = {mode: _sufficient(figures, state, mode) for mode in NOTHING + BITS}
        shown = ", ".join(f"{mode} {depth:g}" for mode, depth in depths.items())
        found.append(f"Depth from which on each suffices, {state}: {shown} (inf: at none of these).")
    accuracies = ", ".join(f"{row['accuracy']:.1f}" for row in figures["rows"])
    return [*found, f"Test accuracy of the trained nets, from the shallowest: {accuracies} %."]


def draw(figures: Figures, path: Path) -> None:
    panels, depths = Panels(STATES), figures["depths"]
    for axis, state in zip(panels.axes, STATES, strict=True):
        for mode in NOTHING + BITS:
            line(axis, mode, depths, [row[state][mode] for row in figures["rows"]])
        amp = [row[state]["autocast"] for row in figures["rows"]]
        axis.plot(depths, amp, color=INK, linestyle="--", linewidth=2, label="bfloat16 autocast itself")
        depth_axis(axis, depths)
        error_axis(axis)
    panels.axes[0].set_ylabel("relative gradient error", color=INK)
    panels.save(path, columns=4)
