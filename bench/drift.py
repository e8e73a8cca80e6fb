"""How long the stack's drift bookkeeping takes, by the clock around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from resode_cuda.drift import DriftMonitor

from .timing import clock_of

BOOKKEEPING = ("begin", "record", "end")


class TimedDrift:
    """A training step that notes how many seconds of it were bookkeeping.

    Clocked in place, since its share of a step is smaller than what steps differ by. On a GPU each call waits for the
    device before and after, and nothing overlaps: the share is then an upper bound.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._clock = step, clock_of(device)
        self.seconds: list[float] = []
        """Of each call."""

    def __call__(self) -> None:
        self.seconds.append(0.0)
        timed: dict[str, Any] = {name: self._timed(getattr(DriftMonitor, name)) for name in BOOKKEEPING}
        with patch.multiple(DriftMonitor, **timed):
            self._step()

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            begin = self._clock()
            method(*args, **kwargs)
            self.seconds[-1] += self._clock() - begin

        return call
