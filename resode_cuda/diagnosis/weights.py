"""How smooth a network's weights are in depth, and what training has made of that.

Weights that start smooth, tied or at zero stay smooth under gradient descent, N max |theta_{n+1} - theta_n| bounded in
N (Marion et al., arXiv:2309.01213; the paper, for linear networks); weights drawn one by one are rough and stay so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..smoothness import profiles, roughness
from ..stack import ResidualStack
from ..text_table import aligned

MOST_NAMES = 6
"""Parameters that the table shows, the roughest."""
ROUGH = 0.5
"""Change from block to block, of the weights' size, from which on they count as rough; of independent ones it is 1.4,
of smooth ones a few times 1/N."""
GROWN = 2.0
"""How many times the change that it was at first counts as more."""


class Smoothness(NamedTuple):
    """How smooth all parameters are in depth, at one moment."""

    roughness: dict[str, float]
    """N max |theta_{n+1} - theta_n| of each parameter by name."""
    change: float
    """max |theta_{n+1} - theta_n| over max |theta_n|, of all parameters together."""


def smoothness_of(stack: ResidualStack) -> Smoothness:
    """The smoothness of the weights that the stack has now."""
    found = roughness(stack)
    differences = [value / (len(stack) - 1) for value in found.values()]
    sizes = [
        max(value.norm().item() for value in values)
        for _, values in profiles(stack, lambda parameter: parameter.detach())
    ]
    size = math.hypot(*sizes)
    return Smoothness(found, math.hypot(*differences) / size if size else 0.0)


def smoothness_in(values: Mapping[str, Any]) -> Smoothness:
    """The last one of a diagnosis' `to_dict()`.

    Raises:
        ValueError: for other dictionaries.
    """
    try:
        last = values["smoothness"][-1]
        return Smoothness({name: float(found) for name, found in last["roughness"].items()}, float(last["change"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            "diagnose: earlier must hold diagnoses, or what their to_dict() gave, got something else"
        ) from error


def table_of_weights(moments: Sequence[Smoothness]) -> list[str]:
    """The roughest parameters, a column for each moment."""
    now = moments[-1].roughness
    names = sorted(now, key=lambda name: -now[name])[:MOST_NAMES]
    if not names:
        return []
    head = ("N max |theta_(n+1) - theta_n|", *(f"earlier {n}" for n in range(1, len(moments))), "now")
    rows = [(name, *(_shown(moment, name) for moment in moments)) for name in names]
    return aligned([head, *rows])


def _shown(moment: Smoothness, name: str) -> str:
    return f"{moment.roughness[name]:.3g}" if name in moment.roughness else "-"


def said_of_weights(moments: Sequence[Smoothness]) -> list[str]:
    """What the verdict says."""
    first, now = moments[0].change, moments[-1].change
    if not moments[-1].roughness:
        return []
    changes = f"Weights change by {now:.1%} of their size from one block to the next at most"
    if len(moments) == 1:
        return [f"{changes}: they are rough in depth."] if now >= ROUGH else [f"{changes}."]
    told = f"{changes}, where it was {first:.1%} at first"
    if now < ROUGH:
        return [f"{told}: training has kept them smooth in depth."]
    if now > GROWN * first:
        return [f"{told}: training has made them rough in depth; smooth_gradients_ keeps them smooth from the start."]
    return [f"{told}: they started rough in depth, and training leaves them so."]
