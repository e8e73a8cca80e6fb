"""Calibrating again while a network trains."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

from torch import Tensor

from .calibration import CalibrationError, Loss, calibrate
from .candidates import PREFERENCES
from .module import AdjointModule, check_keys
from .plan import Plan, checked_tolerance


class Recalibration:
    """When to calibrate again during training, and what it may take of the time.

    Args:
        steps: training steps from one calibration to the next.
        tolerance, loss, prefer: as for `calibrate`.
        share: of the time since the first calibration that all later ones together may take.
    """

    def __init__(
        self, steps: int, tolerance: float | str, share: float, loss: Loss | None, prefer: str = PREFERENCES[0]
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs steps >= 1, got {steps!r}")
        if not 0 < share <= 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs a share in (0, 1], got {share}; 0.01 is 1%")
        self.steps, self.share, self.loss = steps, share, loss
        where = "ResidualStack: recalibrate_every"
        self.tolerance = tolerance if tolerance == "amp" else checked_tolerance(where, tolerance)
        if prefer not in PREFERENCES:
            raise ValueError(f"{where} needs prefer among {PREFERENCES}, got {prefer!r}")
        self.prefer = prefer
        self._count = 0
        self._begin: float | None = None
        self._spent = self._last = 0.0

    def state(self) -> dict[str, Any]:
        """The settings and how far it has got, as plain values; of the loss, whether there is one."""
        return {
            "steps": self.steps,
            "tolerance": self.tolerance,
            "prefer": self.prefer,
            "share": float(self.share),
            "has_loss": self.loss is not None,
            "count": self._count,
            "seconds": None if self._begin is None else time.perf_counter() - self._begin,
            "seconds_spent": self._spent,
            "seconds_of_the_last": self._last,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], loss: Loss | None) -> Recalibration:
        """A recalibration that goes on from such a state.

        Raises:
            TypeError, ValueError: for what is no such state, or without the loss that it had.
        """
        check_keys("recalibration", state, cls(1, 1.0, 1.0, None).state())
        if state["has_loss"] and loss is None:
            raise ValueError(
                "its recalibration has a loss, got none; call recalibrate_every(..., loss=...) before it is loaded"
            )
        found = cls(state["steps"], state["tolerance"], state["share"], loss, state["prefer"])
        seconds = state["seconds"]
        times = [float(value) for value in (seconds or 0.0, state["seconds_spent"], state["seconds_of_the_last"])]
        if not isinstance(state["count"], int) or min(state["count"], *times) < 0 or not all(map(math.isfinite, times)):
            raise ValueError(f"recalibration must have a count and times >= 0, got {state}")
        found._count, found._spent, found._last = state["count"], *times[1:]
        found._begin = None if seconds is None else time.perf_counter() - times[0]
        return found

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
            plan = calibrate(stack, x, *args, tolerance=self.tolerance, loss=self.loss, prefer=self.prefer, **kwargs)
        except CalibrationError as error:
            warnings.warn(f"ResidualStack: recalibration is left out this time; {error}", RuntimeWarning, stacklevel=2)
        self._last = time.perf_counter() - now
        if self._begin is None:
            self._begin = time.perf_counter()
        else:
            self._spent += self._last
        return plan
