"""Best test error against depth, Euler and Heun, by backprop, by the paper's adjoint and by the library's default; and
what `diagnose` had said of each net before."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode_cuda import diagnose
from resode_cuda.diagnosis.verdict import LOST

from ...harness.modes import SCHEMES
from ...harness.tables import Target
from ..experiment import Figures
from ..lab import Lab
from ..networks import PaperNet
from ..one_stage import OneStage, one_stage
from ..options import Options
from ..panels import INK, Panels, depth_axis, line, percent_axis
from ..solvers import SOLVERS
from ..training import side_by_side, test_errors, train

TITLE = "Test error against depth, by backprop and by the adjoint"
MUST_SHOW = (
    "Trained by the paper's adjoint, shallow nets end worse than by backprop; from a depth N of about 16 to 64 on they "
    "end alike, and Heun's from no larger N than Euler's. diagnose, after one epoch by backprop, tells which will fail."
)
MODES = ("backprop", "paper", "corrected")
FAILS = 1.5
"""Median error at the smallest depth, of backprop's, from which on a training counts as failed."""
ALIKE = 0.5
"""Percentage points between medians that count as alike; of 719 digits one is 0.14."""
DIAGNOSED_ROWS = 32


@dataclass(frozen=True)
class Settings:
    net: OneStage
    depths: tuple[int, ...]
    seed: int
    seeds: int


def settings(options: Options) -> Settings:
    depths = (2, 4) if options.quick else (2, 4, 8, 16, 32, 64)
    return Settings(one_stage(options), depths, options.seed, 2 if options.quick else 5)


def measure(settings: Settings, lab: Lab) -> Figures:
    # The longest first, so that none is left alone at the end.
    runs = [(scheme, mode, depth) for depth in settings.depths[::-1] for scheme in SCHEMES[::-1] for mode in MODES]
    rows = lab.results(_trained, [(settings, *run, str(lab.device)) for run in runs])
    nets = [(scheme, depth) for depth in settings.depths[::-1] for scheme in SCHEMES[::-1]]
    told = lab.results(_diagnosed, [(settings, *net, str(lab.device)) for net in nets])
    return {"depths": settings.depths, "seeds": settings.seeds, "rows": rows[::-1], "told": told[::-1]}


def _net(settings: Settings, scheme: str, depth: int, device: str) -> PaperNet:
    architecture = replace(settings.net.architecture, scheme=scheme, steps=(depth,), copies=settings.seeds)
    return architecture.build(settings.seed).to(torch.device(device))


def _trained(settings: Settings, scheme: str, mode: str, depth: int, device: str) -> dict[str, Any]:
    """One training of all seeds side by side; the best error that each had after any epoch, in percent."""
    net, images = _net(settings, scheme, depth, device), settings.net.source.load()
    SOLVERS[mode].apply(net.stacks[0])
    best = [100.0] * settings.seeds

    def judge(epoch: int) -> None:
        best[:] = map(min, best, test_errors(net, images))

    train(net, images, settings.net.recipe, settings.seed, judge)
    return {"scheme": scheme, "mode": mode, "depth": depth, "errors": best}


def _diagnosed(settings: Settings, scheme: str, depth: int, device: str) -> dict[str, Any]:
    """What `diagnose` says of all seeds' stacks after one epoch by backprop. Fresh ones are 0, and all is well."""
    net, images = _net(settings, scheme, depth, device), settings.net.source.load()
    train(net, images, replace(settings.net.recipe, epochs=1), settings.seed)
    batch = next(images.training(DIAGNOSED_ROWS, settings.seed))
    inputs, _ = side_by_side((batch,) * net.copies, torch.device(device))
    layers = list(net)
    with torch.no_grad():
        x = nn.Sequential(*layers[: layers.index(net.stacks[0])])(inputs)
    diagnosis = diagnose(net.stacks[0], x)
    return {"scheme": scheme, "depth": depth, "rebuilt": diagnosis.rebuilt, "verdict": diagnosis.verdict}


def _errors(figures: Figures, scheme: str, mode: str) -> list[list[float]]:
    """Errors of all seeds at each depth."""
    rows = sorted(figures["rows"], key=lambda row: row["depth"])
    return [row["errors"] for row in rows if (row["scheme"], row["mode"]) == (scheme, mode)]


def _medians(figures: Figures, scheme: str, mode: str) -> list[float]:
    return [statistics.median(errors) for errors in _errors(figures, scheme, mode)]


def _meets(figures: Figures, scheme: str, mode: str = "paper") -> float:
    """The depth from which on the adjoint ends as backprop does; infinite if it never does."""
    gaps = [a - b for a, b in zip(*(_medians(figures, scheme, m) for m in (mode, "backprop")), strict=True)]
    alike = [depth for at, depth in enumerate(figures["depths"]) if max(gaps[at:]) <= ALIKE]
    return min(alike, default=float("inf"))


def checks(figures: Figures) -> list[Target]:
    shallow = [_medians(figures, "euler", mode)[0] for mode in ("paper", "backprop")]
    euler, heun = _meets(figures, "euler"), _meets(figures, "heun")
    return [
        Target(
            f"Euler, N = {figures['depths'][0]}: paper's median error over backprop's",
            shallow[0] / shallow[1],
            FAILS,
            at_least=True,
        ),
        Target(f"Euler: depth from which on the paper's adjoint is within {ALIKE:g} points of backprop", euler, 64),
        Target("Heun: the same, no later than Euler's", heun, euler),
        Target(
            "where the paper's adjoint fails: least error of the rebuilt x_0 that diagnose told of",
            min((told for _, _, told, failed in _warnings(figures) if failed), default=float("inf")),
            LOST,
            at_least=True,
        ),
    ]


def _warnings(figures: Figures) -> list[tuple[str, int, float, bool]]:
    """For each net the error of x_0 that diagnose told of, and whether the paper's adjoint failed to train it."""
    found = []
    for scheme in SCHEMES:
        told = {row["depth"]: row["rebuilt"]["paper"] for row in figures["told"] if row["scheme"] == scheme}
        medians = zip(*(_medians(figures, scheme, mode) for mode in ("paper", "backprop")), strict=True)
        for depth, (adjoint, exact) in zip(figures["depths"], medians, strict=True):
            found.append((scheme, depth, told[depth], adjoint - exact > ALIKE))
    return found


def notes(figures: Figures) -> list[str]:
    found = ["“paper” is the paper's adjoint, “corrected” the library's default, at the same cost."]
    for scheme in SCHEMES:
        for mode in MODES:
            shown = ", ".join(f"{error:.1f}" for error in _medians(figures, scheme, mode))
            found.append(f"{scheme.capitalize()}, {mode}: median test error at N = 2, 4, …: {shown} %.")
    for scheme in SCHEMES:
        told = ", ".join(
            f"{error:.2g}{' (failed)' if failed else ''}" for of, _, error, failed in _warnings(figures) if of == scheme
        )
        found.append(f"{scheme.capitalize()}: error of the rebuilt x_0 that diagnose told of before: {told}.")
    found.append(f"From {LOST:g} on it says that training by the paper's solver is likely to fail.")
    return found


def draw(figures: Figures, path: Path) -> None:
    panels, depths = Panels([scheme.capitalize() for scheme in SCHEMES]), figures["depths"]
    for axis, scheme in zip(panels.axes, SCHEMES, strict=True):
        for mode in MODES:
            errors = _errors(figures, scheme, mode)
            line(axis, mode, depths, [statistics.median(of) for of in errors])
            quartiles = [statistics.quantiles(of, n=4, method="inclusive") for of in errors]
            low, high = [q[0] for q in quartiles], [q[2] for q in quartiles]
            axis.fill_between(depths, low, high, color=SOLVERS[mode].colour, alpha=0.15, linewidth=0)
        depth_axis(axis, depths)
        percent_axis(axis)
    panels.axes[0].set_ylabel("best test error, % (median, quartiles)", color=INK)
    panels.save(path)
