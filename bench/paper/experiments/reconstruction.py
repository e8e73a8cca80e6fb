"""How well the first state is rebuilt from the last one, |x̂_0 − x_0| / |x_0|, by random convolutional functions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack, smooth_init_

from ...harness.gradients import fitted_order
from ...harness.models import block_count
from ...harness.modes import SCHEMES
from ...harness.tables import Target
from ..data import Source
from ..experiment import Figures
from ..lab import Lab
from ..networks import residual_function
from ..options import Options
from ..panels import INK, Panels, depth_axis, error_axis, line, slope
from ..solvers import SOLVERS

TITLE = "Reconstruction of the input from the output"
MUST_SHOW = (
    "By the paper's solver the error falls as 1/N for Euler whatever the weights, and for Heun as 1/N² or faster where "
    "weights are smooth in depth; where they alternate or are independent, Heun falls back to 1/N. (Independent ones "
    "of a wide state fall like N^-1.5 until N is about the square of its channels.)"
)
CHANNELS = {"smooth": 8, "alternating": 8, "independent": 8, "independent, narrow": 1}
"""Channels of the state, by how weights vary in depth."""
MODES = ("paper", "corrected")
ASYMPTOTIC = 4
"""Depths, of the deepest, that orders are fitted to."""


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    seed: int
    rows: int = 16


def settings(options: Options) -> Settings:
    exponents = 5 if options.quick else 15 if options.full else 10
    return Settings(tuple(2**k for k in range(1, exponents + 1)), options.seed)


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [
        (weights, scheme, depth, settings.rows, settings.seed)
        for depth in reversed(settings.depths)
        for weights in CHANNELS
        for scheme in SCHEMES
    ]
    return {"depths": settings.depths, "rows": lab.results(_errors, jobs)[::-1]}


def _errors(weights: str, scheme: str, depth: int, rows: int, seed: int) -> dict[str, Any]:
    stack = ResidualStack(_functions(weights, block_count(scheme, depth), seed), scheme).double()
    x = _states(CHANNELS[weights], rows, seed)
    found: dict[str, Any] = {"weights": weights, "scheme": scheme, "depth": depth}
    with torch.no_grad():
        last = stack(x)
        for mode in MODES:
            SOLVERS[mode].apply(stack)
            found[mode] = float((stack.invert(last) - x).norm() / x.norm())
    return found


def _functions(weights: str, count: int, seed: int) -> Sequence[nn.Module]:
    """conv–BN–ReLU–conv–BN; smooth and alternating weights are made of the same two samples A and B at every depth."""
    torch.manual_seed(seed)
    a, b, *others = (residual_function(CHANNELS[weights]) for _ in range(max(2, count)))
    if weights.startswith("independent"):
        return [a, b, *others][:count]
    if weights == "smooth":
        return list(smooth_init_(ResidualStack([a, *others, b])))
    found = [copy.deepcopy(a) for _ in range(count)]
    for n, function in enumerate(found):  # A + B and A - B in turn
        for parameter, other in zip(_kernels(function), _kernels(b), strict=True):
            parameter.data.add_(other.data, alpha=(-1) ** n)
    return found


def _kernels(function: nn.Module) -> list[Tensor]:
    return [module.weight for module in function.modules() if isinstance(module, nn.Conv2d)]


def _states(channels: int, rows: int, seed: int) -> Tensor:
    """Digits after a random convolution, norm and ReLU."""
    torch.manual_seed(seed + 1)
    stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()).double()
    images, _ = next(Source().load().testing(rows))
    found: Tensor = stem(images.double()).detach()
    return found


def _series(figures: Figures, weights: str, scheme: str, mode: str) -> list[float]:
    rows = sorted(figures["rows"], key=lambda row: row["depth"])
    return [row[mode] for row in rows if (row["weights"], row["scheme"]) == (weights, scheme)]


def _order(figures: Figures, weights: str, scheme: str, mode: str = "paper") -> float:
    order = fitted_order(figures["depths"][-ASYMPTOTIC:], _series(figures, weights, scheme, mode)[-ASYMPTOTIC:])
    return float("nan") if order is None else order


def checks(figures: Figures) -> list[Target]:
    found = [Target("smooth, Heun: order", _order(figures, "smooth", "heun"), 2, at_least=True)]
    for weights, scheme in (
        ("smooth", "euler"),
        ("alternating", "euler"),
        ("alternating", "heun"),
        ("independent, narrow", "euler"),
        ("independent, narrow", "heun"),
    ):
        order = _order(figures, weights, scheme)
        found.append(
            Target(f"{weights}, {scheme.capitalize()}: order {order:.2f}, distance from 1", abs(order - 1), 0.1)
        )
    return found


def notes(figures: Figures) -> list[str]:
    orders = "; ".join(
        f"{weights}: Euler {_order(figures, weights, 'euler', 'corrected'):.2f}, Heun "
        f"{_order(figures, weights, 'heun', 'corrected'):.2f}"
        for weights in CHANNELS
    )
    wide = ", ".join(f"{scheme.capitalize()} {_order(figures, 'independent', scheme):.2f}" for scheme in SCHEMES)
    return [
        f"Orders are fitted to the {ASYMPTOTIC} deepest nets.",
        f"Of “corrected”, which costs the same: {orders}.",
        "The local errors of independent weights are random terms of size 1/N² with a mean. What is random adds up to "
        "N^-1.5, the mean to 1/N. In a state of 8 channels the mean is so small that it rules from a depth of about a "
        f"thousand on (orders of the paper's solver here: {wide}), in one of a single channel from 64 on.",
    ]


def _channels(weights: str) -> str:
    count = CHANNELS[weights]
    return f"{count} channel{'s' if count > 1 else ''}"


def draw(figures: Figures, path: Path) -> None:
    panels, depths = Panels([f"{weights}, {_channels(weights)}" for weights in CHANNELS]), figures["depths"]
    for axis, weights in zip(panels.axes, CHANNELS, strict=True):
        for scheme, dashes in zip(SCHEMES, ("-", ":"), strict=True):
            for mode in MODES:
                series = _series(figures, weights, scheme, mode)
                line(axis, mode, depths, series, linestyle=dashes, label=f"{scheme.capitalize()}, {mode}")
        depth_axis(axis, depths)
        error_axis(axis)
        slope(axis, depths, 2.0, 1)
        slope(axis, depths, 0.12, 2)
    panels.axes[0].set_ylabel("|x̂₀ − x₀| / |x₀|", color=INK)
    panels.save(path, columns=6)
