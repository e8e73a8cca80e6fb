"""A diagnosis as a picture. It needs matplotlib."""

from __future__ import annotations

from typing import Any

from ..plan import Plan
from .flow import FlowFacts
from .reconstruction import Reconstruction
from .steps import StepFacts
from .verdict import LARGEST_BOUND
from .weights import MOST_NAMES, Smoothness

LEAST = 1e-17
"""The height of zeros on logarithmic axes."""


def drawn(
    steps: list[StepFacts],
    smoothness: list[Smoothness],
    flow: FlowFacts | None,
    no_flow: str | None,
    found: list[Reconstruction],
    plan: Plan,
) -> Any:
    """Five panels: the steps, the distance from the flow, the weights, what is rebuilt of x_0, and the candidates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    panels = above.subplots(1, 3)
    _draw_steps(panels[0], steps)
    _draw_flow(panels[1], flow, no_flow)
    _draw_weights(panels[2], smoothness)
    panels = below.subplots(1, 2)
    _draw_reconstructions(panels[0], found)
    _draw_candidates(panels[1], plan)
    return figure


def _draw_steps(panel: Any, steps: list[StepFacts]) -> None:
    numbers = [step.n for step in steps]
    for label, values in (
        ("|d| / |x|", [step.size for step in steps]),
        ("h L", [step.steepness for step in steps]),
        ("reverse step's guess off by", [step.gap for step in steps]),
    ):
        panel.semilogy(numbers, [max(value, LEAST) for value in values], ".-", label=label)
    panel.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    panel.set(xlabel="step", title="Steps: from 1 on rebuilding is in doubt")
    panel.legend(frameon=False)


def _draw_flow(panel: Any, flow: FlowFacts | None, no_flow: str | None) -> None:
    panel.set(xlabel="state", title="Distance from the differential equation, of |x|")
    if flow is None:
        panel.text(0.5, 0.5, no_flow or "", ha="center", va="center", wrap=True, transform=panel.transAxes)
        return
    numbers, distances = range(1, len(flow.distances) + 1), [max(d, LEAST) for d in flow.distances]
    panel.semilogy(numbers, distances, ".-", label="measured")
    for bound, line, label in ((flow.bound, "--", "bound"), (flow.close_bound, ":", "bound, step by step")):
        if bound is not None and bound <= LARGEST_BOUND:
            panel.axhline(bound, color="C3", linestyle=line, label=f"{label}, of |x_0|")
    panel.legend(frameon=False)


def _draw_weights(panel: Any, smoothness: list[Smoothness]) -> None:
    panel.set(xlabel="N max |theta(n+1) - theta(n)|", title="Weights along depth: 0 where they are tied")
    now = smoothness[-1].roughness
    names = sorted(now, key=lambda name: -now[name])[:MOST_NAMES]
    for place, moment in enumerate(smoothness):
        label = "now" if moment is smoothness[-1] else f"earlier {place + 1}"
        shade = {"color": str(0.75 * (1 - place / (len(smoothness) - 1)))} if len(smoothness) > 1 else {}
        heights = [names.index(name) for name in names if name in moment.roughness]
        panel.plot([moment.roughness[names[height]] for height in heights], heights, "o", label=label, **shade)
    panel.set_xscale("symlog", linthresh=1e-2)
    panel.set_xlim(left=0)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    if names:
        panel.legend(frameon=False)


def _draw_reconstructions(panel: Any, found: list[Reconstruction]) -> None:
    solvers = list(dict.fromkeys(one.solver for one in found))
    for scheme in dict.fromkeys(one.scheme for one in found):
        mine = [one for one in found if one.scheme == scheme]
        places = [solvers.index(one.solver) for one in mine]
        panel.semilogx([max(one.error, LEAST) for one in mine], places, "o", label=scheme)
    panel.set_yticks(range(len(solvers)), solvers)
    panel.invert_yaxis()
    panel.set(title="x_0 rebuilt from x_N alone, off by")
    panel.grid(axis="x", alpha=0.3)
    panel.legend(frameon=False)


def _draw_candidates(panel: Any, plan: Plan) -> None:
    for candidate in plan.candidates:
        is_chosen = candidate is plan.chosen
        place = candidate.held_bytes / 2**10, max(candidate.error, LEAST)
        panel.loglog(*place, "o", color="C2" if is_chosen else "0.6", label=str(candidate) if is_chosen else None)
    panel.axhline(plan.tolerance, color="C3", linestyle="--", linewidth=1, label="tolerance")
    panel.set(xlabel="KiB held between forward and backward pass", title="Gradient error of what calibrate tried")
    panel.legend(frameon=False)
