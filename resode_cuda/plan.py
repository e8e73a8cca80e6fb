"""A plan: how a stack is to get its gradients, and the measurements that speak for it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from .method import CheckedAnchors
from .reverse import Reverse
from .text_table import aligned

ERRORS = ("error", "input_error", "layer_error")


@dataclass(frozen=True)
class Candidate:
    """A way to get gradients, what it cost on the batch, and how far off it was."""

    gradient: str
    """"adjoint" or "checkpoint"."""
    reverse: Reverse | None
    """None for "checkpoint"."""
    anchors: CheckedAnchors
    evaluations: int
    """Block evaluations of a training step, forward pass included."""
    seconds: float
    """Time of one forward and backward pass of the stack."""
    held_bytes: int
    """Bytes that autograd held between the two, parameters and the input aside."""
    error: float
    """Relative error of all parameter gradients together; infinite where one was not finite."""
    defect: float | None
    """Root mean square of the defects; None without any, or where one was not finite."""
    steps: int = 1
    """Number of steps of the stack."""
    input_error: float | None = None
    """Relative error of the input's gradient; None where there is none."""
    layer_error: float | None = None
    """The largest relative error of one block's parameters."""

    def __post_init__(self) -> None:
        if self.gradient != ("checkpoint" if self.reverse is None else "adjoint"):
            raise ValueError(
                'Candidate: gradient must be "adjoint" with a Reverse, or "checkpoint" with None, got '
                f"{self.gradient!r} with {self.reverse!r}"
            )
        if not _are_anchors(self.anchors):
            raise ValueError(
                f"Candidate: anchors must be an integer >= 1, a tuple of step numbers or None, got {self.anchors!r}"
            )
        for name in ERRORS:
            value = getattr(self, name)
            if not (value is None and name != "error") and not value >= 0:
                raise ValueError(f"Candidate: {name} must be >= 0, got {value!r}")
        if self.defect is not None and not 0 <= self.defect < math.inf:
            raise ValueError(f"Candidate: defect must be finite and >= 0, or None, got {self.defect!r}")

    @property
    def errors(self) -> tuple[float, float | None, float | None]:
        """Errors of all parameters, of the input's gradient, and of the worst block's parameters."""
        return self.error, self.input_error, self.layer_error

    def __str__(self) -> str:
        return told(self.gradient, self.reverse, self.anchors)


def told(gradient: str, reverse: Reverse | None, anchors: CheckedAnchors) -> str:
    """A way of getting gradients in a few words; without a reverse solver it is the gradient's name."""
    if reverse is None:
        return gradient
    name = reverse.predictor
    if reverse.is_stored:
        name += f", {reverse.bits} bit" + ("" if reverse.bits == 1 else "s")
    if reverse.corrections:
        name += f" + {reverse.corrections}"
    if reverse.accelerate:
        name += " accelerated"
    if anchors is None:
        return name
    shown = anchors if isinstance(anchors, int) else f"{{{', '.join(map(str, anchors))}}}"
    return f"{name}, anchors {shown}"


@dataclass(frozen=True)
class Plan:
    """The cheapest candidate within the tolerance, and all that were measured on the way to it.

    `print(plan)` shows them as a table; `stack.apply_plan(plan)` sets the stack; `save` and `load` keep it as JSON.
    """

    tolerance: float
    candidates: tuple[Candidate, ...]
    """All that were tried, in their order. The last one is the plan."""

    @property
    def chosen(self) -> Candidate:
        return self.candidates[-1]

    @property
    def is_last_resort(self) -> bool:
        """Whether no reverse solver met the tolerance, so that the plan is exact checkpointing."""
        return self.chosen.reverse is None

    def within(self, tolerance: float) -> Plan:
        """The plan for a larger tolerance, from the same measurements.

        Raises:
            ValueError: if the tolerance is smaller than this plan's.
        """
        if not tolerance >= self.tolerance:
            raise ValueError(
                f"Plan.within: tolerance must be >= {self.tolerance:g}, which was measured, got {tolerance:g}; "
                "calibrate again"
            )
        count = next(i for i, candidate in enumerate(self.candidates, 1) if candidate.error <= tolerance)
        return Plan(tolerance, self.candidates[:count])

    def __str__(self) -> str:
        head = ("", "evaluations", "ms", "held MiB", "KiB a step", "gradient error", "input's", "worst layer's")
        lines = [
            (
                str(candidate),
                str(candidate.evaluations),
                f"{1e3 * candidate.seconds:.1f}",
                f"{candidate.held_bytes / 2**20:.3g}",
                f"{candidate.held_bytes / 2**10 / candidate.steps:.3g}",
                *("" if e is None else f"{e:.1e}" for e in candidate.errors),
            )
            for candidate in self.candidates
        ]
        end = f"tolerance {self.tolerance:g}: {self.chosen}"
        if self.is_last_resort:
            end += ", the last resort; no reverse solver met the tolerance"
        return "\n".join([*aligned([head, *lines]), end])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        # JSON has no infinity.
        candidates = [
            {name: "inf" if value == math.inf else value for name, value in asdict(candidate).items()}
            for candidate in self.candidates
        ]
        Path(path).write_text(json.dumps({"tolerance": self.tolerance, "candidates": candidates}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan that `save` wrote.

        Raises:
            ValueError: if the file holds no plan.
        """
        try:
            record = json.loads(Path(path).read_text())
            candidates = [
                Candidate(
                    **{
                        **fields,
                        "reverse": fields["reverse"] and Reverse(**fields["reverse"]),
                        "anchors": _from_json(fields["anchors"]),
                        **{name: math.inf for name in ERRORS if fields.get(name) == "inf"},
                    }
                )
                for fields in record["candidates"]
            ]
            return Plan(checked_tolerance("Plan.load", record["tolerance"]), (candidates[0], *candidates[1:]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"Plan.load: {path} must hold a plan written by Plan.save, but does not: {error}"
            ) from error


def _are_anchors(anchors: object) -> bool:
    if isinstance(anchors, tuple):
        return all(type(n) is int and n >= 0 for n in anchors)
    return anchors is None or (type(anchors) is int and anchors >= 1)


def _from_json(anchors: int | list[int] | None) -> CheckedAnchors:
    """JSON has lists for tuples."""
    return tuple(anchors) if isinstance(anchors, list) else anchors


def checked_tolerance(where: str, tolerance: float | str) -> float:
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
        raise ValueError(f"{where}: tolerance must be positive and finite, got {tolerance!r}; 1e-2 is a good start")
    return float(tolerance)
