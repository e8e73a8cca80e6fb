"""What a diagnosis says, in sentences."""

from __future__ import annotations

from ..plan import Candidate, Plan
from .flow import FlowFacts
from .steps import StepFacts
from .weights import Smoothness, said_of_weights

CLOSE = 0.05
"""Distance from the differential equation up to which a network counts as close to it."""
WILD = 0.5
"""|d| / |x| from which on a step is told of."""
LARGEST_BOUND = 10.0
"""In sizes of x_0, above which the bound on the distance is not worth telling."""
STEEP = 1.0
"""h L from which on the reverse iteration need not converge."""
LOST = 0.3
"""|rebuilt x_0 - x_0| / |x_0| from which on gradients taken on the way there are worth nothing."""


def verdict(
    steps: list[StepFacts],
    smoothness: list[Smoothness],
    flow: FlowFacts | None,
    no_flow: str | None,
    rebuilt: dict[str, float],
    plan: Plan,
) -> list[str]:
    """What to do, and why."""
    of_weights = said_of_weights(smoothness)
    return [_of_flow(flow, no_flow), *of_weights, _of_steps(steps), _of_rebuilding(rebuilt), *_of_plan(plan)]


def _of_flow(flow: FlowFacts | None, no_flow: str | None) -> str:
    if flow is None:
        return f"Its differential equation was not solved: {no_flow}."
    distance = max(flow.distances)
    close = "close to" if distance <= CLOSE else "far from"
    said = (
        f"It is {close} its differential equation: states are {distance:.1e} of their size off its trajectory at most"
    )
    if flow.bound is None or flow.close_bound is None:
        return f"{said}."
    if flow.bound > LARGEST_BOUND:
        allows = f"where the bound (e^L - 1) C / (2 N L) says nothing (L = {flow.lipschitz:.2g})"
    else:
        allows = f"where the bound (e^L - 1) C / (2 N L) allows {flow.bound:.1e} of |x_0| (L = {flow.lipschitz:.2g})"
    return f"{said}, {allows}" + (
        f", and step by step {flow.close_bound:.1e}." if flow.close_bound <= LARGEST_BOUND else "."
    )


def _of_steps(steps: list[StepFacts]) -> str:
    wild = [step.n for step in steps if step.size > WILD]
    steep = [step.n for step in steps if step.steepness >= STEEP]
    if not (wild or steep):
        largest = max(steps, key=lambda step: step.steepness)
        return f"Rebuilding converges at every step: h L is {largest.steepness:.2g} at most (step {largest.n})."
    said = []
    if wild:
        said.append(f"the state is moved by more than half its size at {_numbered(wild)}")
    if steep:
        said.append(f"h L is 1 or more at {_numbered(steep)}")
    return (
        f"Rebuilding is in doubt where {' and '.join(said)}: keep those states, or store increments, unless the plan "
        "shows that corrections suffice."
    )


def _of_rebuilding(rebuilt: dict[str, float]) -> str:
    paper, (best, least) = rebuilt["paper"], min(rebuilt.items(), key=lambda found: found[1])
    told = f"From x_N alone the paper's solver rebuilds x_0 with an error of {paper:.1e} of its size"
    warning = "; training by it is likely to fail" if not paper < LOST else ""
    return f"{told}{warning}. The best of all solvers, {best}: {least:.1e}."


def _of_plan(plan: Plan) -> list[str]:
    chosen = plan.chosen
    if chosen.reverse is None:
        way = 'Use gradient="checkpoint", since no reverse solver and no number of bits met the tolerance'
    elif chosen.reverse.is_stored:
        way = f"Store increments: {chosen}"
    else:
        way = f"Rebuild the states: {chosen}"
    measured = f"gradient error {chosen.error:.1e} for a tolerance of {plan.tolerance:.1e}"
    cost = f"{chosen.evaluations} block evaluations a training step, {chosen.held_bytes / 2**20:.3g} MiB held"
    lines = [f"{way} ({measured}; {cost})."]
    better = _best_rebuilding(plan)
    if (chosen.reverse is None or chosen.reverse.is_stored) and better is not None:
        lines.append(f"The best that rebuilding gave: {better}, gradient error {better.error:.1e}.")
    return lines


def _best_rebuilding(plan: Plan) -> Candidate | None:
    rebuilding = [one for one in plan.candidates if one.reverse is not None and not one.reverse.is_stored]
    return min(rebuilding, key=lambda one: one.error, default=None)


def _numbered(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"step {numbers[0]}"
    shown = ", ".join(map(str, numbers[:6]))
    return f"steps {shown}" + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
