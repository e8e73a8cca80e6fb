"""The method of a stack: its scheme, its steps, its reverse solver, and which exact states are kept.

This is the one place that knows which states and increments a step keeps, and what it is predicted from. Formulas are
in `schemes`, the reverse solver in `reverse`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from .dtypes import dtype_name
from .reverse import DEFAULT_BITS, Reverse, extrapolation_weights, integer, quotient
from .schemes import Scheme

Anchors = int | Collection[int] | None
"""Steps whose starting states are kept exactly: every K-th, these, or none."""
CheckedAnchors = int | tuple[int, ...] | None
"""The same, as modules and plans keep it: step numbers ascending, each once."""
WEIGHTS_OF_THE_LAST_TWO_STEPS = (0.0, -1.0)
"""They are predicted by their own increments, which the forward pass has saved, in the place of d_{n+2}."""


@dataclass(frozen=True)
class Method:
    """How a network of blocks is stepped through, forwards and backwards.

    Args:
        scheme: the formulas of a step.
        steps: h of each step, dimensionless.
        solver: how the backward pass rebuilds states. The default asks the forward pass to save nothing for it.
        anchors: numbers of the steps whose starting state is kept exactly, ascending.

    Attributes:
        weights: (a, b) of each step n, extrapolated as y = x_{n+1} - (a d_{n+1} - b d_{n+2}); empty where the solver
            does not extrapolate. The last two steps are predicted exactly, with their own increment for d_{n+2}, a = 0
            and b = -1.
        factor_range: the least and the greatest number by which steps and their adjoints multiply; NaN if one is.
        segments: the runs of steps whose increments are stored. Each has a companion of its own, which starts at the
            state before its first step and ends at the one after its last.
    """

    scheme: type[Scheme]
    steps: tuple[float, ...]
    solver: Reverse = Reverse()  # noqa: RUF009 (frozen)
    anchors: tuple[int, ...] = ()
    weights: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)
    factor_range: tuple[float, float] = field(init=False, repr=False, compare=False)
    segments: tuple[range, ...] = field(init=False, repr=False, compare=False)
    _places: dict[int, int] = field(init=False, repr=False, compare=False)
    _stored_places: dict[int, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bits = self.solver.bits
        if isinstance(bits, tuple) and len(bits) != len(self.steps):
            raise ValueError(
                f"Reverse: bits must be one number or {len(self.steps)}, one for each step, got {len(bits)}"
            )
        # Not when they are first asked for: a compiler may be tracing then.
        count = len(self.steps) if self.solver.extrapolates else 0
        weights = (
            extrapolation_weights(self.scheme, self.steps, n) if n < count - 2 else WEIGHTS_OF_THE_LAST_TWO_STEPS
            for n in range(count)
        )
        object.__setattr__(self, "weights", tuple(weights))
        factors = list(self._factors())
        is_number = not any(map(math.isnan, factors))
        extremes = (min(factors, default=1.0), max(factors, default=1.0)) if is_number else (math.nan, math.nan)
        object.__setattr__(self, "factor_range", extremes)
        object.__setattr__(self, "_places", {n: place for place, n in enumerate(self.anchors)})
        object.__setattr__(self, "segments", tuple(self._segments()))
        stored = ((segment, n) for segment, steps in enumerate(self.segments) for n in steps)
        places = {n: (place, segment) for place, (segment, n) in enumerate(stored)}
        object.__setattr__(self, "_stored_places", places)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def _factors(self) -> Iterator[float]:
        weights = [self.scheme.weight(h) for h in self.steps]
        yield from self.steps
        yield from weights
        # The adjoint is scaled by its step's weight: what it is multiplied by from one step to the next, and at x_0.
        for before, weight in pairwise([1.0, *weights]):
            yield quotient(before, weight)
        for of_two_increments in self.weights[:-2]:
            yield from of_two_increments

    def _segments(self) -> Iterator[range]:
        if not self.solver.is_stored:
            return
        for before, anchor in pairwise((-1, *self.anchors, len(self))):
            if anchor > before + 1:
                yield range(before + 1, anchor)

    def check_steps(self, where: str, dtype: torch.dtype) -> None:
        """Check that states of this dtype can be multiplied by all that the steps call for.

        Raises:
            ValueError: for a factor that is 0, subnormal or not finite in the dtype.
        """
        limits, (least, greatest) = torch.finfo(dtype), self.factor_range
        if not (limits.tiny <= least and greatest <= limits.max):
            wider = "" if dtype == torch.float64 else ", or a wider dtype"
            raise ValueError(
                f"{where}: step must keep h, 1/h and the ratios of successive steps between {limits.tiny:.1e} and "
                f"{limits.max:.1e} in {dtype_name(dtype)}, got factors from {least:.1e} to {greatest:.1e}; use steps "
                f"closer to 1/{len(self)}{wider}"
            )

    def is_anchored(self, n: int) -> bool:
        """Whether the exact state that step n starts from is kept."""
        return n in self._places

    def anchor_place(self, n: int) -> int | None:
        """Place of step n's starting state among the kept ones, None where it is not kept."""
        return self._places.get(n)

    @property
    def anchor_count(self) -> int:
        return len(self.anchors)

    @property
    def extrapolates(self) -> bool:
        return self.solver.extrapolates

    @property
    def reuses(self) -> bool:
        return self.solver.reuse

    @property
    def measures_defects(self) -> bool:
        """Whether the backward pass compares each y with what its evaluation says of x_n."""
        return self.reuses or self.solver.is_stored

    def is_stored(self, n: int) -> bool:
        """Whether step n's increment is stored in a few bits."""
        return n in self._stored_places

    @property
    def stored_steps(self) -> tuple[int, ...]:
        """Numbers of the steps whose increments are stored, ascending."""
        return tuple(self._stored_places)

    def stored_place(self, n: int) -> int:
        """Place of step n among those whose increments are stored."""
        return self._stored_places[n][0]

    def segment_of(self, n: int) -> int:
        """Number of the segment that step n, whose increment is stored, belongs to."""
        return self._stored_places[n][1]

    def begins_segment(self, n: int) -> bool:
        """Whether the companion starts at step n's starting state."""
        return self.is_stored(n) and (n == 0 or self.is_anchored(n - 1))

    def ends_segment(self, n: int) -> bool:
        """Whether no rebuilt state is needed after step n: it is the last, or the next one's is kept."""
        return n == len(self) - 1 or self.is_anchored(n + 1)

    @property
    def defect_slack(self) -> list[float]:
        """Multiples of `max_drift` that each step's defect may have: each bit of a stored increment less than 8 doubles
        it."""
        bits = (self.solver.bits_of(n) if self.is_stored(n) else DEFAULT_BITS for n in range(len(self)))
        return [2.0 ** (DEFAULT_BITS - b) for b in bits]

    @property
    def kept_increments(self) -> int:
        """Number of increments, those of the last steps, that the forward pass keeps for the backward pass."""
        return min(2, len(self.steps)) if self.extrapolates else 0

    @property
    def step_weights(self) -> list[float]:
        """The factor of the stages' sum in each step's increment."""
        return list(map(self.scheme.weight, self.steps))

    @property
    def exactly_predicted(self) -> frozenset[int]:
        """The steps whose vector-Jacobian product is taken at x_n itself, not at an approximation."""
        count = len(self.steps)
        return frozenset((*self.anchors, *range(count - self.kept_increments, count)))

    @property
    def block_count(self) -> int:
        return len(self.steps) + self.scheme.blocks_per_step - 1

    def blocks_of(self, n: int) -> slice:
        """The places of step n's blocks."""
        return slice(n, n + self.scheme.blocks_per_step)


def checked_anchors(where: str, anchors: Anchors, steps: int) -> CheckedAnchors:
    """Anchors as a user gives them, sorted, each once.

    Raises:
        TypeError: for what is neither an integer, nor a collection of integers, nor None.
        ValueError: for an interval below 1, or a number that is not one of the steps'.
    """
    if anchors is None:
        return None
    if (interval := integer(anchors)) is not None:
        if interval < 1:
            raise ValueError(f"{where}: anchors must be >= 1, got {interval}; use None for no anchors")
        return interval
    if isinstance(anchors, (str, bytes)) or not isinstance(anchors, Iterable) or getattr(anchors, "ndim", 1) == 0:
        raise TypeError(f"{where}: anchors must be an integer, a collection of step numbers or None, got {anchors!r}")
    numbers = set()
    for given in anchors:
        n = integer(given)
        if n is None:
            raise TypeError(f"{where}: anchors must be step numbers, got {given!r}; use integers from 0 to {steps - 1}")
        if not 0 <= n < steps:
            raise ValueError(f"{where}: anchors must be numbers of the {steps} steps, got {n}; count them from 0")
        numbers.add(n)
    return tuple(sorted(numbers))


def anchored_steps(anchors: CheckedAnchors, steps: int) -> tuple[int, ...]:
    """Numbers of the steps whose starting state is kept, from anchors that were checked."""
    if anchors is None:
        return ()
    return tuple(range(0, steps, anchors)) if isinstance(anchors, int) else tuple(anchors)
