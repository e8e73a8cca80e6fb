"""What a model's loop has called the layers of a stage with, as the arguments of one call of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..adjoint.block_arguments import Call

BY_LAYER = "_arguments_by_layer"
"""Keyword by which layers get arguments of their own: a list of calls, and the number of each layer's."""


def in_one_call(calls: Sequence[Call]) -> Call:
    """The arguments of all layers, or `BY_LAYER` where they differ."""
    distinct: list[Call] = []
    numbers = []
    for call in calls:
        number = next((n for n, other in enumerate(distinct) if _is_same(tuple(call), tuple(other))), len(distinct))
        if number == len(distinct):
            distinct.append(call)
        numbers.append(number)
    return distinct[0] if len(distinct) == 1 else Call((), {BY_LAYER: (distinct, numbers)})


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    return isinstance(a, (bool, int, float, str)) and a == b
