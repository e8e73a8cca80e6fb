"""What the modules of this library share: their method, how they train, and their drift."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .adjoint.drift import ON_DRIFT, Drift, DriftMonitor
from .method import Anchors, CheckedAnchors, Method, anchored_steps, checked_anchors
from .reverse import Reverse, solver_from
from .schemes import SCHEMES

GRADIENTS = ("adjoint", "checkpoint", "backprop")


class AdjointModule(nn.Module):
    """A residual network of steps with a choice of backward passes.

    Args:
        scheme: a name of `SCHEMES`.
        steps: h of each step.
        gradient, reverse, anchors, max_drift, on_drift: as the properties say.
    """

    def __init__(
        self,
        scheme: str,
        steps: Sequence[float],
        *,
        gradient: str,
        reverse: str | Reverse,
        anchors: Anchors,
        max_drift: float,
        on_drift: str,
    ) -> None:
        super().__init__()
        self._method = Method(SCHEMES[scheme], tuple(steps))
        self._monitor = DriftMonitor(self._where, len(self._method))
        self._recalibration: Any = None  # set by ResidualStack.recalibrate_every
        self.max_drift = max_drift
        self.on_drift = on_drift
        self.gradient = gradient
        self.reverse = reverse
        self.anchors = anchors

    @property
    def _where(self) -> str:
        """The name that errors and warnings begin with."""
        return type(self).__name__

    @property
    def drift(self) -> Drift | None:
        """What the last backward pass measured of its error; None before the first, after a forward pass that is not
        for the adjoint.

        Tensors on the device of the input; reading their values is what waits for the device.
        """
        return self._monitor.read()

    @property
    def gradient(self) -> str:
        """`"adjoint"`, `"checkpoint"` or `"backprop"`; may be set between training steps."""
        return self._gradient

    @gradient.setter
    def gradient(self, gradient: str) -> None:
        if gradient not in GRADIENTS:
            raise ValueError(f"{self._where}: gradient must be one of {GRADIENTS}, got {gradient!r}")
        self._gradient = gradient
        self._monitor.fallback_requested = False
        self._monitor.gradient_error_per_defect = None

    @property
    def reverse(self) -> Reverse:
        """The reverse solver; may be set, also by a preset's name, between training steps."""
        return self._method.solver

    @reverse.setter
    def reverse(self, reverse: str | Reverse) -> None:
        self._method = replace(self._method, solver=solver_from(self._where, reverse))
        self._monitor.gradient_error_per_defect = None

    @property
    def anchors(self) -> CheckedAnchors:
        """Steps from one kept state to the next, or the numbers of the steps whose starting state is kept; may be set
        between training steps."""
        return self._anchors

    @anchors.setter
    def anchors(self, anchors: Anchors) -> None:
        self._anchors = checked_anchors(self._where, anchors, len(self._method))
        self._method = replace(self._method, anchors=anchored_steps(self._anchors, len(self._method)))
        self._monitor.gradient_error_per_defect = None

    @property
    def max_drift(self) -> float:
        """The largest defect that is accepted; may be set between training steps."""
        return self._monitor.max_drift

    @max_drift.setter
    def max_drift(self, max_drift: float) -> None:
        if not isinstance(max_drift, (int, float)) or isinstance(max_drift, bool):
            raise TypeError(f"{self._where}: max_drift must be a number, got {max_drift!r}")
        if not max_drift > 0:
            raise ValueError(
                f'{self._where}: max_drift must be > 0, got {max_drift}; use on_drift="ignore" for no limit'
            )
        self._monitor.max_drift = float(max_drift)

    @property
    def on_drift(self) -> str:
        """`"ignore"`, `"warn"`, `"raise"` or `"checkpoint"`; may be set between training steps."""
        return self._monitor.on_drift

    @on_drift.setter
    def on_drift(self, on_drift: str) -> None:
        if on_drift not in ON_DRIFT:
            raise ValueError(f"{self._where}: on_drift must be one of {ON_DRIFT}, got {on_drift!r}")
        self._monitor.on_drift = on_drift

    @property
    def scheme(self) -> str:
        """`"euler"` or `"heun"`."""
        return self._method.scheme.name

    @property
    def steps(self) -> tuple[float, ...]:
        """h of each step."""
        return self._method.steps

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that say how the network is stepped through and trained.

        A module of this class, or one of the other class with the same blocks, made with them behaves alike.
        """
        return {
            "scheme": self.scheme,
            "step": self.steps,
            "gradient": self.gradient,
            "reverse": self.reverse,
            "anchors": self.anchors,
            "max_drift": self.max_drift,
            "on_drift": self.on_drift,
        }

    def _replicate_for_data_parallel(self) -> AdjointModule:
        # Replicas run in threads at once; each measures a drift of its own, which is not read.
        replica: AdjointModule = super()._replicate_for_data_parallel()
        replica._monitor = copy.copy(self._monitor)
        return replica

    def _described(self) -> str:
        shown = f"scheme={self.scheme!r}, steps={len(self.steps)}, gradient={self.gradient!r}"
        if self.gradient == "adjoint":
            shown += f", reverse={self.reverse}"
        return shown if self.anchors is None else f"{shown}, anchors={self.anchors}"


def checked_steps(where: str, step: float | Sequence[float] | None, count: int) -> tuple[float, ...]:
    """h of each of `count` steps; None is 1/count.

    Raises:
        TypeError: for what is no number.
        ValueError: for another count, or a step that is not positive and finite.
    """
    if step is None:
        return (1 / count,) * count
    if getattr(step, "requires_grad", False):
        raise TypeError(f"{where}: step must not require gradients, got a tensor that does; detach it")
    try:
        steps = tuple(map(float, step)) if isinstance(step, Iterable) else (float(step),) * count
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: step must be a number, one for each step, or None, got {step!r}") from error
    if len(steps) != count:
        raise ValueError(f"{where}: step must be one number or {count}, one for each step, got {len(steps)}")
    for h in steps:
        if not (math.isfinite(h) and h > 0):
            raise ValueError(f"{where}: step must be positive and finite, got {h}; leave it out for 1/{count}")
    return steps
