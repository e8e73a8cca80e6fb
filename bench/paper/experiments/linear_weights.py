"""Weights of a linear residual net along depth, while gradient descent fits the net to a matrix.

x_{n+1} = x_n + x_n A_n / N, x_0 = I, with 2×2 matrices A_n that start at 0; loss: mean square of x_N − B, where
B = I + randn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode_cuda import ResidualStack, diagnose
from resode_cuda.smoothness import roughness

from ...harness.tables import Target
from ..experiment import Figures
from ..lab import Lab
from ..options import Options
from ..panels import INK, Panels

TITLE = "Gradient descent keeps a linear net smooth in depth"
MUST_SHOW = (
    "Weights that start at 0 are a smooth function of depth at every moment of training, and N·max|θ(n+1) − θ(n)| is "
    "the same at every N; weights that start rough stay rough. The trained nets' distance from their differential "
    "equation falls like 1/N, as its bounds do."
)
DIM = 2
SHOWN = 100
"""The depth whose weights are drawn, which is the authors'."""
JUDGED = (25, 200)
MOMENTS = 4
CLOSE = 5.0
"""How many times the distance from the differential equation a bound may be to count as near."""
COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#0072B2", "#000000")


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...]
    seed: int
    rough: float = 1.0
    """Standard deviation of the weights that start rough."""
    most_steps: int = 10_000
    loss: float = 1e-5
    """Training ends below it."""


def settings(options: Options) -> Settings:
    # With the seed of the authors' code, 6, the target is theirs.
    depths = (25, SHOWN) if options.quick else (25, 50, SHOWN, 200, 400)
    return Settings((*depths, 800, 1600) if options.full else depths, 6 + options.seed)


def measure(settings: Settings, lab: Lab) -> Figures:
    jobs = [(settings, depth, 0.0) for depth in settings.depths] + [(settings, SHOWN, settings.rough)]
    *smooth, rough = lab.results(_trained, jobs)
    return {"smooth": smooth, "rough": rough}


def _trained(settings: Settings, depth: int, scale: float) -> dict[str, Any]:
    torch.manual_seed(settings.seed)
    target = (torch.eye(DIM) + torch.randn(DIM, DIM)).double()
    blocks = [nn.Linear(DIM, DIM, bias=False, dtype=torch.float64) for _ in range(depth)]
    for block in blocks:
        nn.init.normal_(block.weight, std=scale)
    stack, start = ResidualStack(blocks, gradient="backprop"), torch.eye(DIM, dtype=torch.float64)
    # The gradient of each weight is O(1/N). The authors' rate, 100 at N = 100, is stable with this target.
    optimizer = torch.optim.SGD(stack.parameters(), lr=depth)
    found: dict[str, Any] = {"depth": depth, "losses": [], "roughness": []}
    entries = []
    for _ in range(settings.most_steps):
        loss = (stack(start) - target).square().mean()
        found["losses"].append(loss.item())
        found["roughness"].append(depth / (depth - 1) * roughness(stack)["weight"])  # which counts differences
        entries.append([round(block.weight[0, 0].item(), 5) for block in blocks])
        if not loss > settings.loss:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = len(entries) - 1
    flow = diagnose(stack, start).flow
    if flow is not None:
        found |= {"distance": flow.farthest, "bound": flow.bound, "close_bound": flow.close_bound}
    found["entries"] = {str(step): entries[step] for step in (last // 2**back for back in reversed(range(MOMENTS)))}
    return found


def checks(figures: Figures) -> list[Target]:
    largest = [max(run["roughness"]) for run in figures["smooth"] if JUDGED[0] <= run["depth"] <= JUDGED[1]]
    rough = figures["rough"]["roughness"]
    return [
        Target("N·max|θ(n+1) − θ(n)|, largest N's over smallest, N = 25 to 200", max(largest) / min(largest), 1.05),
        Target("loss at the end of the worst run", max(run["losses"][-1] for run in figures["smooth"]), 1e-5),
        Target("trained: bound step by step over the distance, worst N", max(_ratios(figures, "close_bound")), CLOSE),
        Target("the same, least N, so that it holds", min(_ratios(figures, "close_bound")), 1, at_least=True),
        Target("trained: bound (e^L − 1) C / 2NL over the distance, worst N", max(_ratios(figures, "bound")), CLOSE),
        Target("rough start: least roughness over that of the start", min(rough) / rough[0], 0.5, at_least=True),
    ]


def _ratios(figures: Figures, bound: str) -> list[float]:
    return [run[bound] / run["distance"] for run in figures["smooth"]]


def notes(figures: Figures) -> list[str]:
    largest = ", ".join(f"{max(run['roughness']):.3f} (N = {run['depth']})" for run in figures["smooth"])
    return [
        f"Largest N·max|θ(n+1) − θ(n)| of a training that starts at 0: {largest}; that starts rough: "
        f"{max(figures['rough']['roughness']):.0f} (N = {SHOWN}).",
        "Distance of the trained nets from their differential equation, of |x_0|: "
        + ", ".join(f"{run['distance']:.1e} (N = {run['depth']})" for run in figures["smooth"])
        + ". The target turns by more than a right angle, which the bound (e^L − 1) C / 2NL takes for growth.",
    ]


def draw(figures: Figures, path: Path) -> None:
    titles = (f"from 0, N = {SHOWN}", f"from a rough start, N = {SHOWN}", "roughness from 0, every N")
    panels = Panels(titles, shared=False, height=3.8)
    shown = next(run for run in figures["smooth"] if run["depth"] == SHOWN)
    for axis, run in zip(panels.axes, (shown, figures["rough"]), strict=False):
        for colour, (step, entry) in zip(COLOURS, run["entries"].items(), strict=False):
            axis.plot(range(len(entry)), entry, color=colour, linewidth=1.5, label=f"after {step} steps")
        axis.set_xlabel("block n", color=INK)
        axis.set_ylabel("first entry of the weight", color=INK)
        axis.legend(fontsize=8, frameon=False, loc="upper right")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.45 * (high - low))
    axis = panels.axes[2]
    for place, (colour, run) in enumerate(zip(COLOURS, figures["smooth"], strict=False)):
        # Thinner from one to the next, so that lines that coincide stay in sight.
        axis.plot(run["roughness"], color=colour, linewidth=7 * 0.65**place, label=f"N = {run['depth']}")
    axis.set_xlabel("step of gradient descent", color=INK)
    axis.set_ylabel("N·max|θ(n+1) − θ(n)|", color=INK)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    panels.figure.savefig(path)
