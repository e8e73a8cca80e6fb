"""Whether increments could be stored in their bits, from what the forward pass measured of their rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..method import Method
from ..stored import quantum_count

COARSE = 2.0
"""Quanta over the largest whole number that rounding may be of what is rounded; at most 1.7 by the formula."""
TOLD_OF = 0.1
"""The share of an increment below which what was rounded off is not told of, however many bits it has."""
HARMLESS = 0.01
"""The share of a typical value of a state that may be rounded off in any case."""


class Rounding(NamedTuple):
    """What was rounded off a step's increment: norms of states."""

    off: float
    """|x_{n+1} - c_{n+1}|"""
    of: float
    """|x_{n+1} - c_n|, what was rounded."""
    typical: float
    """The norm of a state all of whose values are as large as a typical one's."""


def finest_shares(method: Method) -> list[float]:
    """The share of each step's increment that its bits may round off; empty where nothing is stored."""
    if not method.solver.is_stored:
        return []
    return [max(COARSE / quantum_count(method.solver.bits_of(n)), TOLD_OF) for n in range(len(method))]


def first_coarse(roundings: Sequence[Rounding], finest: Sequence[float]) -> tuple[int, float] | None:
    """The first step whose rounding is coarser than its bits make it, and rounding over what was rounded.

    Values far apart within a group, or states that outgrow the first ones, leave its units too coarse or too small.
    """
    for n, (rounding, share) in enumerate(zip(roundings, finest, strict=True)):
        if rounding.off > max(share * rounding.of, HARMLESS * rounding.typical):
            return n, rounding.off / rounding.of if rounding.of else math.inf
    return None


class StoredRounding:
    """What a depth-fused forward pass measured of the increments that it stored.

    Args:
        method: of the network.
        squares: [steps, 3], the squares of each step's `Rounding`; zero where nothing is stored.
    """

    def __init__(self, method: Method, squares: Tensor) -> None:
        self.slack = method.defect_slack
        self.numbers = (squares,)
        self.judge = RoundingJudge(finest_shares(method))


class RoundingJudge(NamedTuple):
    """Judges a network's forward pass; its layers, which are functions of the state alone, have nothing to replay."""

    finest: Sequence[float]
    """As `finest_shares`."""

    def coarse(self, squares: Sequence[Sequence[float]]) -> tuple[int, float] | None:
        """As `first_coarse`, of the numbers of a `StoredRounding`."""
        return first_coarse([Rounding(*map(math.sqrt, of_step)) for of_step in squares], self.finest)


def too_coarse(share: float) -> str:
    """What is told of a step whose increment could not be stored in its bits."""
    return (
        f"could not be stored in its bits: {percent(share)} of it was rounded off, since states outgrow the first "
        "ones a thousandfold, or values of very different sizes lie side by side, and gradients are as far off; "
        'keep the states from there on (anchors), normalise them, or use gradient="checkpoint"'
    )


def percent(change: float) -> str:
    return f"{change:.0%}" if change >= 0.1 else f"{100 * change:.2g}%"
