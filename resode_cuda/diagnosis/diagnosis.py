"""`diagnose`: is a network close to an ordinary differential equation, does rebuilding suit it, and what else would?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..calibration import calibrate
from ..plan import Plan
from ..stack import ResidualStack
from ..text_table import aligned
from .flow import TOLERANCE, TOLERANCE_AT_KINKS, FlowFacts, follow_flow
from .probe import Probe
from .reconstruction import Reconstruction, reconstructions
from .steps import StepFacts, facts_of_steps, has_kinks
from .verdict import verdict
from .weights import Smoothness, smoothness_in, smoothness_of, table_of_weights

MOST_ROWS = 24
"""Steps that the table shows, those that move the state most."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. `print(diagnosis)` shows it as tables; `figure()` draws it; `to_dict()` is for JSON."""

    scheme: str
    steps: list[StepFacts]
    smoothness: list[Smoothness]
    """How smooth the weights are in depth, at the earlier moments that were given, and now."""
    flow: FlowFacts | None
    """The network beside its differential equation; None where there is none to solve."""
    no_flow: str | None
    """Why there is none."""
    reconstructions: list[Reconstruction]
    plan: Plan
    """The cheapest way to get gradients within the tolerance, measured by `calibrate`, with all that was tried."""

    @property
    def suits_rebuilding(self) -> bool:
        """Whether the plan rebuilds states, rather than storing increments or checkpointing."""
        chosen = self.plan.chosen.reverse
        return chosen is not None and not chosen.is_stored

    @property
    def rebuilt(self) -> dict[str, float]:
        """|rebuilt x_0 - x_0| / |x_0| of each solver by name, in the stack's own scheme, from x_N alone."""
        return {found.solver: found.error for found in self.reconstructions if found.scheme == self.scheme}

    @property
    def verdict(self) -> list[str]:
        """What to do, and why, in sentences."""
        return verdict(self.steps, self.smoothness, self.flow, self.no_flow, self.rebuilt, self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; infinities as strings."""
        return _plain(
            {
                "scheme": self.scheme,
                "steps": [step._asdict() for step in self.steps],
                "smoothness": [moment._asdict() for moment in self.smoothness],
                "flow": None if self.flow is None else self.flow._asdict(),
                "no_flow": self.no_flow,
                "reconstructions": [found._asdict() for found in self.reconstructions],
                "plan": asdict(self.plan),
                "suits_rebuilding": self.suits_rebuilding,
                "verdict": self.verdict,
            }
        )

    def figure(self) -> Any:
        """A matplotlib Figure of it, to be saved by `figure.savefig(...)`.

        Raises:
            ImportError: without matplotlib.
        """
        from .figure import drawn

        return drawn(self.steps, self.smoothness, self.flow, self.no_flow, self.reconstructions, self.plan)

    def __str__(self) -> str:
        parts = [*_table_of_steps(self.steps), "", *_table_of_reconstructions(self.reconstructions)]
        parts += ["", *table_of_weights(self.smoothness), "", str(self.plan), "", *self.verdict]
        return "\n".join(parts)


def diagnose(
    stack: ResidualStack,
    x: Tensor,
    /,
    *args: Any,
    tolerance: float | str = 1e-2,
    loss: Callable[[Any], Tensor] | None = None,
    prefer: str = "memory",
    earlier: Sequence[Diagnosis | Mapping[str, Any]] = (),
    **kwargs: Any,
) -> Diagnosis:
    """Measure what decides how a network can be trained without its states, and say what follows.

    Each step's size |d_n| / |x_n| and steepness (the spectral norm of its Jacobian, h L, by Lanczos' method), how its
    increment differs from the one before, and how far the reverse step's guess is from x_n; the distance between the
    network's states and the trajectory of its differential equation, beside the bound of Sander, Ablin and Peyré; what
    each scheme and solver rebuilds of x_0 from x_N; how smooth the parameters are in depth; and the plan of
    `calibrate`, the cheapest way to get gradients within the tolerance.

    A copy of the stack in float64 is looked at, so it takes twice the memory of its parameters (four times that of
    16-bit ones), and about 80 evaluations of each block, and one to two hundred for the differential equation. That is
    solved to 1e-8 of the state, where there are kinks (ReLU and its like) to 1e-4. Random numbers are the same in all
    evaluations of a step; what is rebuilt of networks that draw some says little: use eval mode.

    Args:
        stack: in the mode (train or eval) in which it is looked at.
        x, *args, **kwargs: as for the stack's forward pass. A small batch does.
        tolerance, loss, prefer: as of `calibrate`.
        earlier: diagnoses of the same stack at earlier moments of its training, the oldest first, or what their
            `to_dict()` gave. The smoothness of the weights is shown beside theirs.

    Raises:
        TypeError: for a stack that is none.
        ValueError: as `calibrate`, or if `earlier` holds something else.
    """
    if not isinstance(stack, ResidualStack):
        raise TypeError(f"diagnose: stack must be a ResidualStack, got {type(stack).__name__}; use to_blocks()")
    before = [found.smoothness[-1] if isinstance(found, Diagnosis) else smoothness_in(found) for found in earlier]
    probe = Probe(stack, x, args, kwargs)
    steps = facts_of_steps(probe)
    flow, no_flow = _flow(probe, steps)
    return Diagnosis(
        stack.scheme,
        steps,
        [*before, smoothness_of(stack)],
        flow,
        no_flow,
        reconstructions(probe),
        calibrate(stack, x, *args, tolerance=tolerance, loss=loss, prefer=prefer, **kwargs),
    )


def _flow(probe: Probe, steps: list[StepFacts]) -> tuple[FlowFacts | None, str | None]:
    lipschitz = max(step.steepness / step.h for step in steps)
    try:
        return follow_flow(probe, lipschitz, TOLERANCE_AT_KINKS if has_kinks(probe) else TOLERANCE), None
    except ImportError as error:
        return None, f"{error}; pip install torchdiffeq"
    except (ValueError, AssertionError) as error:
        # Of blocks that differ, or of a step size that underflows where the flow explodes.
        return None, str(error).removeprefix("diagnose: ")


def _table_of_steps(steps: list[StepFacts]) -> list[str]:
    shown = sorted(sorted(steps, key=lambda step: -step.size)[:MOST_ROWS])
    head = ("step", "h", "|d|/|x|", "h L", "turn", "guess off by", "units switched")
    rows = [
        (
            str(step.n),
            f"{step.h:.3g}",
            *(f"{value:.1e}" for value in (step.size, step.steepness, step.turn, step.gap)),
            f"{step.switched:.1%}",
        )
        for step in shown
    ]
    left = len(steps) - len(shown)
    return [*aligned([head, *rows]), *([f"and {left} steps that move the state less"] if left else [])]


def _table_of_reconstructions(found: list[Reconstruction]) -> list[str]:
    schemes = list(dict.fromkeys(one.scheme for one in found))
    errors = {(one.solver, one.scheme): one.error for one in found}
    rows = [
        (solver, *(f"{errors[solver, scheme]:.1e}" for scheme in schemes))
        for solver in dict.fromkeys(one.solver for one in found)
    ]
    return aligned([("x_0 rebuilt from x_N, off by", *schemes), *rows])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
