"""What the modules of this library share: their method, how they train, and their drift."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from .adjoint.drift import ON_DRIFT, Drift, DriftMonitor
from .method import Anchors, CheckedAnchors, Method, anchored_steps, checked_anchors
from .reverse import DEFAULT_BITS, Reverse, solver_from
from .schemes import Scheme

GRADIENTS = ("adjoint", "checkpoint", "backprop")
RECALIBRATION = (
    *("steps", "tolerance", "prefer", "share", "has_loss", "has_group"),
    *("count", "seconds", "seconds_spent", "seconds_of_the_last"),
)
"""What is kept of a recalibration. Without one all are None, since torch's distributed checkpoints are loaded into a
state that must have the keys of the saved one."""


class AdjointModule(nn.Module):
    """A residual network of steps with a choice of backward passes.

    Args:
        scheme: the formulas of a step.
        steps: h of each step.
        gradient, reverse, anchors, max_drift, on_drift: as the properties say.
    """

    def __init__(
        self,
        scheme: type[Scheme],
        steps: Sequence[float],
        *,
        gradient: str,
        reverse: str | Reverse,
        anchors: Anchors,
        max_drift: float,
        on_drift: str,
    ) -> None:
        super().__init__()
        self._method = Method(scheme, tuple(steps))
        self._monitor = DriftMonitor(self._where, len(self._method))
        self._switched_off: str | None = None  # what gradient_checkpointing = False has replaced
        self._recalibration: Any = None  # set by ResidualStack.recalibrate_every
        self.max_drift = max_drift
        self.on_drift = on_drift
        self.gradient = gradient
        self.reverse = reverse
        self.anchors = anchors
        # Further limits are those of the states' dtype, which a forward pass knows.
        self._method.check_steps(self._where, torch.float64)

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
        self._monitor.settings_changed()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether gradients come without stored activations; the switch that trainers know.

        Setting it to False is `gradient="backprop"`, setting it to True what `gradient` was before, or "adjoint".
        transformers' `gradient_checkpointing_enable()` sets it in all modules of a model.
        """
        return self.gradient != "backprop"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        if enable and self.gradient == "backprop":
            self.gradient = self._switched_off or "adjoint"
        elif not enable and self.gradient != "backprop":
            self._switched_off, self.gradient = self.gradient, "backprop"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Train without stored activations, as transformers' models are told to. The keywords are those of torch's
        checkpointing, which is not used."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Train by backprop."""
        self.gradient_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Train without stored activations or by backprop, as timm's models are told to."""
        self.gradient_checkpointing = enable

    @property
    def reverse(self) -> Reverse:
        """The reverse solver; may be set, also by a preset's name, between training steps."""
        return self._method.solver

    @reverse.setter
    def reverse(self, reverse: str | Reverse) -> None:
        solver = solver_from(self._where, reverse)
        self._method = replace(self._method, solver=solver)
        self._monitor.settings_changed()

    @property
    def anchors(self) -> CheckedAnchors:
        """Steps from one kept state to the next, or the numbers of the steps whose starting state is kept; may be set
        between training steps."""
        return self._anchors

    @anchors.setter
    def anchors(self, anchors: Anchors) -> None:
        self._anchors = checked_anchors(self._where, anchors, len(self._method))
        self._method = replace(self._method, anchors=anchored_steps(self._anchors, len(self._method)))
        self._monitor.settings_changed()

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
        """`"ignore"`, `"warn"`, `"raise"`, `"store"` or `"checkpoint"`; may be set between training steps."""
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

    def training_state(self) -> dict[str, Any]:
        """What a run that is to be resumed keeps beside `state_dict`: how the module trains by now.

        The settings that may change during training, by hand, by `on_drift="checkpoint"` or by a plan; whether the next
        training step is to be the first by checkpointing; which steps are to be measured next; the ratio of gradient
        error to defects that the plan's calibration measured; and where `ResidualStack.recalibrate_every` stands,
        without its loss and its group.

        Plain values alone: `torch.save`, `torch.load(weights_only=True)` and JSON keep it, and
        `torch.distributed.checkpoint` does, which holds each value once, from whichever rank. Where ranks may differ,
        since each judges its own batch, give it the states of all as one string (`examples/distributed.py`).
        """
        anchors, ratio = self.anchors, self._monitor.gradient_error_per_defect
        return {
            "steps": len(self.steps),
            "fallback_requested": self._monitor.wants_fallback(),
            "unmeasured": sorted(self._monitor.unmeasured),
            "turn": self._monitor.turn,
            "gradient": self.gradient,
            "reverse": asdict(self.reverse),
            "anchors": list(anchors) if isinstance(anchors, tuple) else anchors,
            # JSON has no infinity.
            "max_drift": None if self.max_drift == math.inf else self.max_drift,
            "on_drift": self.on_drift,
            "gradient_error_per_defect": ratio if ratio is not None and math.isfinite(ratio) else None,
            "recalibration": self._recalibration.state() if self._recalibration else dict.fromkeys(RECALIBRATION),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Train from now on as a module did when its `training_state` was taken.

        Args:
            state: what that returned. Where it calibrates again with a loss or a group, first give this module these by
                `ResidualStack.recalibrate_every`: they stay, all else of a recalibration is the state's, its end
                too.

        Raises:
            ValueError: for a state that is none or is not of a module with as many steps; nothing has changed then.
        """
        try:
            with _all_or_nothing(self):
                self._load_training_state(state)
        except (TypeError, ValueError, OverflowError) as error:
            count = len(self.steps)
            raise ValueError(
                f"{self._where}: load_training_state needs the training_state of a module with {count} steps, got "
                f"another: {error}"
            ) from error

    def _load_training_state(self, state: dict[str, Any]) -> None:
        check_keys("the state", state, self.training_state())
        if state["steps"] != len(self.steps):
            raise ValueError(f"steps must be {len(self.steps)}, got {state['steps']!r}")
        reverse = Reverse(**state["reverse"])
        check_keys("reverse", state["reverse"], asdict(reverse))
        fallback_requested, ratio = state["fallback_requested"], state["gradient_error_per_defect"]
        if not isinstance(fallback_requested, bool):
            raise TypeError(f"fallback_requested must be True or False, got {fallback_requested!r}")
        if ratio is not None and not 0 <= float(ratio) < math.inf:
            raise ValueError(f"gradient_error_per_defect must be finite and >= 0, or None, got {ratio!r}")
        unmeasured, turn, recalibration = set(state["unmeasured"]), state["turn"], state["recalibration"]
        if not {*unmeasured, turn} <= {*range(len(self.steps))}:
            raise ValueError(
                f"unmeasured and turn must be numbers of the {len(self.steps)} steps, got {unmeasured} and {turn!r}"
            )
        if recalibration == dict.fromkeys(RECALIBRATION):
            recalibration = None
        self.gradient, self.reverse, self.anchors = state["gradient"], reverse, state["anchors"]
        self.max_drift = math.inf if state["max_drift"] is None else state["max_drift"]
        self.on_drift = state["on_drift"]
        self._recalibration = self._resumed_recalibration(recalibration)
        # The setters have forgotten what is this module's own.
        self._monitor.fallback_requested = fallback_requested
        self._monitor.unmeasured, self._monitor.turn = unmeasured, turn
        self._monitor.gradient_error_per_defect = None if ratio is None else float(ratio)

    def _resumed_recalibration(self, state: dict[str, Any] | None) -> Any:
        if state is not None:
            raise ValueError(f"a {self._where} does not calibrate, got a recalibration")
        return None

    def _fall_back_where_asked_for(self) -> None:
        """Go on with what `on_drift` names where the last backward pass gave reason to."""
        if self._monitor.fallback_requested and self.on_drift == "store" and self.reverse.bits != DEFAULT_BITS:
            self.reverse = "stored"
            self._monitor.fallback_requested = False
        elif self._monitor.fallback_requested:
            self.gradient = "checkpoint"

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


@contextmanager
def _all_or_nothing(module: AdjointModule) -> Iterator[None]:
    """An error inside leaves the module's settings, and its monitor's, as they were."""
    before = [(vars(changed), dict(vars(changed))) for changed in (module, module._monitor)]
    try:
        yield
    except BaseException:  # an interrupt too
        for now, then in before:
            now.update(then)
        raise


def check_keys(what: str, given: object, expected: Iterable[str]) -> None:
    """Check that `given` is a dict with these keys and no others.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be a dict, got {type(given).__name__}")
    missing, unknown = [key for key in expected if key not in given], [key for key in given if key not in expected]
    if missing or unknown:
        raise ValueError(f"{what} must have the keys {list(expected)}, got one without {missing} and with {unknown}")


def checked_steps(where: str, step: float | Sequence[float] | None, count: int) -> tuple[float, ...]:
    """h of each of `count` steps; None is 1/count.

    Raises:
        TypeError: for what is no number, or a tensor that requires gradients, which would get none.
        ValueError: for another count, or a step that is not positive and finite.
    """
    if step is None:
        return (1 / count,) * count
    is_one = not isinstance(step, Iterable) or getattr(step, "ndim", 1) == 0
    given = [step] * count if is_one else list(step)  # type: ignore[arg-type]
    if any(getattr(h, "requires_grad", False) for h in (step, *given)):
        raise TypeError(f"{where}: step must not require gradients, got a tensor that does; detach it")
    try:
        steps = tuple(map(float, given))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: step must be a number, one for each step, or None, got {step!r}") from error
    if len(steps) != count:
        raise ValueError(f"{where}: step must be one number or {count}, one for each step, got {len(steps)}")
    for h in steps:
        if not (math.isfinite(h) and h > 0):
            raise ValueError(f"{where}: step must be positive and finite, got {h}; leave it out for 1/{count}")
    return steps


def default_reverse(step: object, steps: tuple[float, ...]) -> str:
    """The reverse solver of whoever asks for none: for networks of ordinary form, h = 1, nothing can be rebuilt once
    they are trained."""
    return "stored" if step is not None and set(steps) == {1.0} else "corrected"


def checked_block_form(
    scheme: str, step: object, steps: tuple[float, ...], stream_dtype: torch.dtype | None
) -> tuple[float, ...]:
    """The steps of a stack whose blocks add the state themselves, all 1.

    Raises:
        ValueError: for other settings that such blocks do not leave open.
    """
    if scheme != "euler":
        raise ValueError(f'ResidualStack: form="block" must go with scheme="euler", got {scheme!r}; leave scheme out')
    if step is not None and set(steps) != {1.0}:
        raise ValueError(
            f'ResidualStack: form="block" must have step=1.0, which blocks that add the state themselves take, got '
            f"{step!r}; leave step out"
        )
    if stream_dtype is not None:
        raise ValueError(
            f'ResidualStack: form="block" must have no stream_dtype, since blocks add the state in their own, got '
            f"{stream_dtype}; leave it out"
        )
    return (1.0,) * len(steps)
