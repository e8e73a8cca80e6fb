"""How far gradients are from backprop's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .modes import BASELINE, MODES
from .workload import Workload


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|got - exact| / |exact|, 2-norms over all tensors together."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, exact, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / sum(float(b.square().sum()) for _, b in pairs))


def errors(workload: Workload, modes: Sequence[str] = tuple(MODES)) -> dict[str, float]:
    """The relative error of all parameter gradients against backprop, for each mode, on the current batch."""
    exact = workload.gradients(BASELINE)
    return {mode: relative_error(workload.gradients(mode), exact) for mode in modes}


def fitted_order(depths: Sequence[int], errors: Sequence[float]) -> float | None:
    """p of error ~ depth^-p by least squares on logarithms, over depths of 16 and more; None if there are not two."""
    points = [(math.log(n), math.log(e)) for n, e in zip(depths, errors, strict=True) if n >= 16]
    if len(points) < 2:
        return None
    centre_u, centre_v = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((u - centre_u) * (v - centre_v) for u, v in points) / sum((u - centre_u) ** 2 for u, _ in points)
    return -slope
