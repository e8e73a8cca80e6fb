"""How long the stack's drift bookkeeping takes, by the clock around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from resode_cuda.adjoint.drift import DriftMonitor
from resode_cuda.ops import reference

from .timing import clock_of

BOOKKEEPING = {DriftMonitor: ("begin", "row", "record", "end"), reference: ("_add_squares_",)}
"""What is clocked. On a GPU the kernel that rebuilds the state sums the squares too, which then cost no pass."""


class TimedDrift:
    """A training step that notes how many seconds of it were bookkeeping.

    Clocked in place, since its share of a step is smaller than what steps differ by. On a GPU each call waits for the
    device before and after, and nothing overlaps: the share is then an upper bound.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._clock = step, clock_of(device)
        self.seconds: list[float] = []
        """Seconds of bookkeeping in each call."""

    def __call__(self) -> None:
        self.seconds.append(0.0)
        with ExitStack() as patches:
            for where, names in BOOKKEEPING.items():
                timed: dict[str, Any] = {name: self._timed(getattr(where, name)) for name in names}
                patches.enter_context(patch.multiple(where, **timed))
            self._step()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self._clock()
            result = function(*args, **kwargs)
            self.seconds[-1] += self._clock() - begin
            return result

        return call
