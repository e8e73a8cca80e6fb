"""Calibrating again while a network trains."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

from torch import Tensor, distributed

from .calibration import CalibrationError, calibrate
from .candidates import PREFERENCES
from .module import AdjointModule, check_keys
from .plan import Plan, checked_tolerance
from .trial import Loss
from .worst_rank import WorstRank


class Recalibration:
    """When to calibrate again during training, and what it may take of the time.

    Args:
        steps: training steps from one calibration to the next.
        tolerance, loss, prefer: as for `calibrate`.
        share: of the time since the first calibration that all later ones together may take.
        group: as for `calibrate`. Where one rank has no time for it yet, all leave it out.
    """

    def __init__(
        self,
        steps: int,
        tolerance: float | str,
        share: float,
        loss: Loss | None,
        prefer: str = PREFERENCES[0],
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs steps >= 1, got {steps!r}")
        if not 0 < share <= 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs a share in (0, 1], got {share}; 0.01 is 1%")
        self.steps, self.share, self.loss, self.group = steps, share, loss, group
        where = "ResidualStack: recalibrate_every"
        self.tolerance = tolerance if tolerance == "amp" else checked_tolerance(where, tolerance)
        if prefer not in PREFERENCES:
            raise ValueError(f"{where} needs prefer among {PREFERENCES}, got {prefer!r}")
        self.prefer = prefer
        self._count = 0
        self._begin: float | None = None
        self._spent = self._last = 0.0

    def state(self) -> dict[str, Any]:
        """The settings and how far it has got, as plain values; of loss and group, whether there is one."""
        return {
            "steps": self.steps,
            "tolerance": self.tolerance,
            "prefer": self.prefer,
            "share": float(self.share),
            "has_loss": self.loss is not None,
            "has_group": self.group is not None,
            "count": self._count,
            "seconds": None if self._begin is None else time.perf_counter() - self._begin,
            "seconds_spent": self._spent,
            "seconds_of_the_last": self._last,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], given: Recalibration | None) -> Recalibration:
        """A recalibration that goes on from such a state.

        Args:
            given: has the loss and the group, which no state holds.

        Raises:
            TypeError, ValueError: for what is no such state, or without the loss or the group that it had.
        """
        check_keys("recalibration", state, cls(1, 1.0, 1.0, None).state())
        loss, group = (None, None) if given is None else (given.loss, given.group)
        for name, value in (("loss", loss), ("group", group)):
            if state[f"has_{name}"] and value is None:
                raise ValueError(
                    f"its recalibration has a {name}, got none; call recalibrate_every(..., {name}=...) before it is "
                    "loaded"
                )
        found = cls(state["steps"], state["tolerance"], state["share"], loss, state["prefer"], group)
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
        if self._begin is not None:
            if (self._count - 1) % self.steps:
                return None
            is_too_soon = self._spent + self._last > self.share * (now - self._begin)
            ranks = WorstRank("ResidualStack: recalibrate_every", self.group, x.device)
            if any(ranks.of([float(is_too_soon)])):
                return None
        plan = None
        try:
            settings: dict[str, Any] = {
                "tolerance": self.tolerance,
                "loss": self.loss,
                "prefer": self.prefer,
                "group": self.group,
            }
            plan = calibrate(stack, x, *args, **settings, **kwargs)
        except CalibrationError as error:
            warnings.warn(f"ResidualStack: recalibration is left out this time; {error}", RuntimeWarning, stacklevel=2)
        self._last = time.perf_counter() - now
        if self._begin is None:
            self._begin = time.perf_counter()
        else:
            self._spent += self._last
        return plan
