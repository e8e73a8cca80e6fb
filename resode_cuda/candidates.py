"""The ways of getting gradients that `calibrate` may try: what each will cost, their order, and which have no prospect.

Costs are known before anything runs, so candidates are tried from the cheapest on. Errors are not; but what has been
measured tells what is in vain: corrections that do not converge, and bits too few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .method import CheckedAnchors, anchored_steps
from .reverse import Reverse
from .stored import BITS

PREFERENCES = ("memory", "time")
MOST_CORRECTIONS = 4
FIRST_STATE = (0,)
WILD = 0.5
"""|d_n| / |x_n| from which on a step gains nothing by error feedback, so that its state is kept instead."""
CONVERGING = 0.9
"""The largest ratio of the errors of two successive corrections after which a third is tried."""
ACCELERATED = 2
"""How many plain corrections an accelerated one may be worth."""
HOPEFUL = 3.0
"""How many times the tolerance a prediction may be for a candidate to be tried."""


class Choice(NamedTuple):
    """How a stack gets its gradients."""

    gradient: str
    reverse: Reverse | None = None
    anchors: CheckedAnchors = None

    def evaluations(self, steps: int) -> float:
        """Evaluations of the increment in a training step, per step of the stack."""
        if self.reverse is None:
            return 2.0
        kept = len(anchored_steps(self.anchors, steps))
        return 1 + (kept + (steps - kept) * self.reverse.evaluations) / steps

    def states(self, steps: int, padding: float = 1.0) -> float:
        """Memory held between the forward and the backward pass, in states of float32.

        Args:
            padding: values that are stored for each value of a state, since samples are filled up to whole groups.
        """
        if self.reverse is None:
            return float(steps)
        kept = len(anchored_steps(self.anchors, steps))
        if not self.reverse.is_stored:
            return kept + (3.0 if self.reverse.extrapolates else 1.0)
        bits = self.reverse.bits_of(0) + 0.25
        return kept + 1 + (steps - kept) * padding * bits / 32


EXACT = Choice("checkpoint")
PROBE = Choice("adjoint", Reverse("step"), FIRST_STATE)
"""Its defects tell which states are worth keeping where states are rebuilt."""
SOLVERS = tuple(
    sorted(
        (
            Reverse(predictor, corrections, accelerate=accelerate)
            for corrections in range(MOST_CORRECTIONS + 1)
            for predictor in ("extrapolate", "step")
            for accelerate in ((False, True) if corrections >= 2 else (False,))
        ),
        key=lambda solver: solver.evaluations,
    )
)
"""Those that rebuild, from the cheapest to the dearest."""
STORED = tuple(Reverse("stored", bits=bits) for bits in BITS)


def first_choices(prefer: str) -> tuple[Choice, ...]:
    """What is cheapest whatever the network is, and tried before it is looked at."""
    solvers = SOLVERS[:2] if prefer == "memory" else SOLVERS[:1]
    return tuple(Choice("adjoint", solver) for solver in solvers)


def all_choices(
    steps: int,
    prefer: str,
    rebuilt_badly: Sequence[tuple[int, ...]],
    wild: Sequence[tuple[int, ...]],
    padding: float = 1.0,
) -> list[Choice]:
    """All others, from the cheapest on.

    Args:
        prefer: "memory" or "time", by which they are sorted; the other one decides between equals.
        rebuilt_badly: sets of steps that a reverse solver's defects propose to keep the states of.
        wild: sets of steps whose increments are large, which stored increments gain nothing for.
        padding: as for `Choice.states`.

    Those that hold as much as checkpointing are left out, and under "time" those that take longer, which is exact.
    """
    intervals = [steps_between for steps_between in _halved(math.isqrt(steps)) if steps_between > 1]
    for_rebuilding: list[CheckedAnchors] = [None, FIRST_STATE, *rebuilt_badly, *wild, *intervals]
    found = [
        Choice("adjoint", solver, anchors)
        for anchors in _each_once(for_rebuilding, steps)
        for solver in SOLVERS
        if Choice("adjoint", solver, anchors) not in first_choices(prefer)
    ]
    found += [Choice("adjoint", solver, anchors) for anchors in _each_once([None, *wild], steps) for solver in STORED]

    def cost(choice: Choice) -> tuple[float, float]:
        memory, time = choice.states(steps, padding), choice.evaluations(steps)
        return (memory, time) if prefer == "memory" else (time, memory)

    longest = math.inf if prefer == "memory" else EXACT.evaluations(steps)
    cheaper = (c for c in found if c.states(steps, padding) < steps and c.evaluations(steps) <= longest)
    return sorted(cheaper, key=cost)


def sets_by_size(sizes: Sequence[float], limit: float) -> Iterator[tuple[int, ...]]:
    """The steps whose size is above the limit, the largest 1, 2, 4, ... of them; at most half of all."""
    large = [n for n, size in enumerate(sizes) if not size <= limit]
    large.sort(key=lambda n: sizes[n] if math.isfinite(sizes[n]) else math.inf, reverse=True)
    large = large[: len(sizes) // 2]
    count = 1
    while large and count < 2 * len(large):
        yield tuple(sorted(large[:count]))
        count *= 2


def sets_by_defect(defects: Sequence[float], tolerance: float) -> Iterator[tuple[int, ...]]:
    """Sets of steps with large defects, the worst 1, 2, 4, ... of them, each with the first step.

    A defect is large above the tolerance. One that is not finite is the worst; it hides those of all steps before it.
    At most half of the steps join the first: with more, checkpointing is the choice.
    """
    broken = max((n for n, defect in enumerate(defects) if not math.isfinite(defect)), default=0)
    sizes = [0.0 if n < max(1, broken) else defect for n, defect in enumerate(defects)]
    for steps in sets_by_size(sizes, tolerance):
        yield (0, *steps)


def has_prospect(choice: Choice, errors: Mapping[Choice, float], tolerance: float) -> bool:
    """Whether what was measured so far lets a choice meet the tolerance."""
    solver = choice.reverse
    if solver is None:
        return True
    if solver.is_stored:
        return _has_enough_bits(choice, errors, tolerance)
    if solver.corrections < 2:
        return True
    before, last = (errors.get(_with_corrections(choice, solver.corrections - back)) for back in (2, 1))
    if before is None or last is None:
        # What it would be judged by has had no prospect itself.
        return False
    if not math.isfinite(last):
        return False
    if solver.accelerate and solver.corrections == 2:
        return last < 10 * before
    if last > CONVERGING * before:
        return False
    remaining = MOST_CORRECTIONS - solver.corrections + 1
    ratio = (last / before) ** (ACCELERATED if solver.accelerate else 1)
    return last * ratio**remaining <= HOPEFUL * tolerance


def _with_corrections(choice: Choice, corrections: int) -> Choice:
    """The same with fewer corrections; they are accelerated where they can be, if these are."""
    assert choice.reverse is not None
    accelerate = bool(choice.reverse.accelerate) and corrections >= 2
    return choice._replace(reverse=Reverse(choice.reverse.predictor, corrections, accelerate=accelerate))


def _has_enough_bits(choice: Choice, errors: Mapping[Choice, float], tolerance: float) -> bool:
    """Errors halve with each bit."""
    assert choice.reverse is not None
    bits = choice.reverse.bits_of(0)
    for fewer in reversed(BITS[: BITS.index(bits)]):
        error = errors.get(choice._replace(reverse=Reverse("stored", bits=fewer)))
        if error is not None:
            return error * 2.0 ** (fewer - bits) <= HOPEFUL * tolerance
    return True


def _each_once(anchors: Sequence[CheckedAnchors], steps: int) -> list[CheckedAnchors]:
    """Without those that keep the same states as one before."""
    by_steps: dict[tuple[int, ...], CheckedAnchors] = {}
    for given in anchors:
        by_steps.setdefault(anchored_steps(given, steps), given)
    return list(by_steps.values())


def _halved(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2
