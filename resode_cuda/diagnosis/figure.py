"""A diagnosis as a picture. It needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

from .verdict import LARGEST_BOUND

LEAST = 1e-17
"""Where zeros are drawn on logarithmic axes."""


def drawn(diagnosis: Diagnosis) -> Any:
    """Four panels: the steps, the distance from the flow, what is rebuilt of x_0, and the plan's candidates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_steps(panels[0, 0], diagnosis)
    _draw_flow(panels[0, 1], diagnosis)
    _draw_reconstructions(panels[1, 0], diagnosis)
    _draw_candidates(panels[1, 1], diagnosis)
    return figure


def _draw_steps(panel: Any, diagnosis: Diagnosis) -> None:
    numbers = [step.n for step in diagnosis.steps]
    for label, values in (
        ("|d| / |x|", [step.size for step in diagnosis.steps]),
        ("h L", [step.steepness for step in diagnosis.steps]),
        ("reverse step's guess off by", [step.gap for step in diagnosis.steps]),
    ):
        panel.semilogy(numbers, [max(value, LEAST) for value in values], ".-", label=label)
    panel.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    panel.set(xlabel="step", title="Steps: above 1 nothing is rebuilt")
    panel.legend(frameon=False)


def _draw_flow(panel: Any, diagnosis: Diagnosis) -> None:
    panel.set(xlabel="state", title="Distance from the differential equation, of |x|")
    if diagnosis.flow is None:
        panel.text(0.5, 0.5, diagnosis.no_flow or "", ha="center", va="center", wrap=True, transform=panel.transAxes)
        return
    distances = diagnosis.flow.distances
    panel.semilogy(range(1, len(distances) + 1), [max(d, LEAST) for d in distances], ".-", label="measured")
    if diagnosis.flow.bound is not None and diagnosis.flow.bound <= LARGEST_BOUND:
        panel.axhline(diagnosis.flow.bound, color="C3", linestyle="--", label="bound, of |x_0|")
    panel.legend(frameon=False)


def _draw_reconstructions(panel: Any, diagnosis: Diagnosis) -> None:
    found = diagnosis.reconstructions
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


def _draw_candidates(panel: Any, diagnosis: Diagnosis) -> None:
    plan = diagnosis.plan
    for candidate in plan.candidates:
        is_chosen = candidate is plan.chosen
        place = candidate.held_bytes / 2**20, max(candidate.error, LEAST)
        panel.loglog(*place, "o", color="C2" if is_chosen else "0.6", label=str(candidate) if is_chosen else None)
    panel.legend(frameon=False)
    panel.axhline(plan.tolerance, color="C3", linestyle="--", linewidth=1)
    panel.set(xlabel="MiB held between forward and backward pass", title="Gradient error of what calibrate tried")
