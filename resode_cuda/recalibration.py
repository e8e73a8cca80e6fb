"""Calibrating again while a network trains."""

from __future__ import annotations

import time
import warnings
from typing import Any

from torch import Tensor

from .calibration import CalibrationError, Loss, calibrate
from .module import AdjointModule
from .plan import Plan, checked_tolerance


class Recalibration:
    """When to calibrate again during training, and what it may take of the time.

    Args:
        steps: training steps from one calibration to the next.
        tolerance, loss: as for `calibrate`.
        share: of the time since the first calibration that all later ones together may take.
    """

    def __init__(self, steps: int, tolerance: float, share: float, loss: Loss | None) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs steps >= 1, got {steps!r}")
        if not 0 < share <= 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs a share in (0, 1], got {share}; 0.01 is 1%")
        self.steps, self.share, self.loss = steps, share, loss
        self.tolerance = checked_tolerance("ResidualStack: recalibrate_every", tolerance)
        self._count = 0
        self._begin: float | None = None
        self._spent = self._last = 0.0

    def plan(self, stack: AdjointModule, x: Tensor, args: Any, kwargs: Any) -> Plan | None:
        """Counts a training step; the new plan, if it is time for one. A batch that allows none is only warned of."""
        self._count += 1
        now = time.perf_counter()
        if self._begin is not None and (
            (self._count - 1) % self.steps or self._spent + self._last > self.share * (now - self._begin)
        ):
            return None
        plan = None
        try:
            plan = calibrate(stack, x, *args, tolerance=self.tolerance, loss=self.loss, **kwargs)
        except CalibrationError as error:
            warnings.warn(f"ResidualStack: recalibration is left out this time; {error}", RuntimeWarning, stacklevel=2)
        self._last = time.perf_counter() - now
        if self._begin is None:
            self._begin = time.perf_counter()
        else:
            self._spent += self._last
        return plan
