"""Watching the reconstruction: the defects that the solver measures for free, and what is done about them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..devices import is_capturing
from ..squares import square_dtype, squared_norm

ON_DRIFT = ("ignore", "warn", "raise", "checkpoint")


class DriftError(RuntimeError):
    """A defect above `max_drift`, or a state that is not finite, in a stack with `on_drift="raise"`."""


class Drift(NamedTuple):
    """What the last backward pass measured of its own error.

    y is the point at which a step's vector-Jacobian product was taken and x_n the rebuilt state, so the defect
    |y - x_n| / |x_n| (2-norms over the whole batch) is a running measure of the error of y. It is 0 for steps that
    start from an anchor or that were not rebuilt because nothing before them needs a gradient.
    """

    defects: Tensor
    """Shape [steps], float64, on the device of the stack's input. NaN for a solver without reuse, which measures
    none."""
    maximum: Tensor
    """The largest defect, shape []."""
    reconstruction: Tensor | None = None
    """|rebuilt x_0 - x_0| / |x_0|, shape []: the true error at the end of the reconstruction. None without
    `keep_input=True`, and where the backward pass ended before x_0. With anchors it has grown since the last one."""
    gradient_error: Tensor | None = None
    """Estimated relative error of the gradient, shape []: the root mean square of the defects, times the factor between
    the two that `calibrate` measured. None before a plan was applied."""


class DriftMonitor:
    """Squared norms of each step's defect and rebuilt state, written on the device in the backward pass.

    They are looked at without waiting for the device: at once on a CPU; elsewhere they are copied asynchronously and
    read in a later forward pass, once the copy has arrived, or when `drift` is read.
    """

    def __init__(self, where: str, steps: int, max_drift: float = 0.05, on_drift: str = "ignore") -> None:
        self._where = where
        self.max_drift, self.on_drift = max_drift, on_drift
        self.gradient_error_per_defect: float | None = None
        self.fallback_requested = False
        """Whether on_drift="checkpoint" has found reason to."""
        self._steps = steps
        # [steps + 1, 2]: |y - x_n|^2, |x_n|^2, and at the end the same of the input.
        self._squares: Tensor | None = None
        self._rows: tuple[Tensor, ...] = ()
        self._measured = False
        self._reached_input = False
        self._unchecked = False
        self._warned_of: set[str] = set()
        # Host copies of the squares, each with the event of its arrival.
        self._arriving: list[tuple[Tensor, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled stack has had no backward pass.
        return _monitor, (self._where, self._steps, self.max_drift, self.on_drift, self.gradient_error_per_defect)

    def begin(self, stream: Tensor, measures: bool) -> None:
        """A backward pass starts; it measures defects, or looks for NaN and Inf alone."""
        self._prepared(stream).zero_()
        self._measured, self._reached_input = measures, False

    def squares(self, stream: Tensor) -> Tensor:
        """Shape [steps + 1, 2], for a backward pass that fills all steps' rows at once."""
        return self._prepared(stream)

    def watch(self, node: Any, squares: Tensor, measures: bool) -> None:
        """Begin and end with the backward pass of an autograd node that fills the first rows of `squares`."""

        def begin(cotangents: tuple[Tensor | None, ...]) -> None:
            if cotangents[0] is None:
                return
            if is_legacy_batchedtensor(cotangents[0]):  # is_grads_batched=True
                self.forget()
                return
            # A forward pass in between, on another device, has made others.
            self._squares, self._rows = squares, squares.unbind()
            self.begin(cotangents[0], measures)
            self._unchecked = True

        node.register_prehook(begin)
        node.register_hook(lambda *_: self.end())

    def _prepared(self, stream: Tensor) -> Tensor:
        if self._squares is None or self._squares.device != stream.device:
            self._squares = torch.zeros(self._steps + 1, 2, dtype=square_dtype(stream.device), device=stream.device)
            self._rows = self._squares.unbind()
        return self._squares

    def row(self, n: int) -> Tensor:
        """The place where the step's squared norms |y - x_n|^2 and |x_n|^2 are to be added up."""
        self._unchecked = True
        return self._rows[n]

    def record(self, n: int, x: Tensor) -> None:
        """Step n rebuilt x, and no defect was measured."""
        self._square(self.row(n)[1], x)

    def record_input(self, rebuilt: Tensor, x: Tensor) -> None:
        """The state that the reconstruction ended with, and the one that it started from in the forward pass."""
        self._reached_input = True
        row = self.row(self._steps)
        self._square(row[0], rebuilt - x)
        self._square(row[1], x)

    @staticmethod
    def _square(place: Tensor, vector: Tensor) -> None:
        place.copy_(squared_norm(vector))

    def end(self) -> None:
        """A backward pass rebuilt all that it will. What a CUDA graph measures on its replays is not judged."""
        if self._squares is None or not self._unchecked:
            return
        self._unchecked = False
        if is_capturing() or self._squares.is_meta:
            return
        if self._squares.device.type == "cpu":
            self._judge(self._squares)
        elif not self._has_warned_of_all():
            host = torch.empty(self._squares.shape, dtype=self._squares.dtype, pin_memory=True)
            host.copy_(self._squares, non_blocking=True)
            arrived = torch.get_device_module(self._squares.device).Event()
            arrived.record()
            self._arriving.append((host, arrived))

    def poll(self) -> None:
        """Judge what has arrived by now; all there is, where the answer decides what happens next."""
        self.end()
        must_know = self.on_drift in ("raise", "checkpoint")
        while self._arriving and (must_know or self._arriving[0][1].query()):
            host, arrived = self._arriving.pop(0)
            arrived.synchronize()
            self._judge(host)

    def forget(self) -> None:
        """The next backward pass is not the adjoint's."""
        self._measured = self._reached_input = False

    def read(self) -> Drift | None:
        self.poll()
        if self._squares is None or not (self._measured or self._reached_input):
            return None
        ratios = self._ratios(self._squares)
        defects = ratios[:-1] if self._measured else torch.full_like(ratios[:-1], torch.nan)
        factor = self.gradient_error_per_defect
        return Drift(
            defects,
            defects.max(),
            ratios[-1] if self._reached_input else None,
            None if factor is None else factor * root_mean_square(defects),
        )

    def _ratios(self, squares: Tensor) -> Tensor:
        difference, scale = squares.sqrt().unbind(1)
        return torch.where(difference == 0, difference, difference / scale)

    def _has_warned_of_all(self) -> bool:
        """Whether no further finding would be reported."""
        reported = {"ignore": {"broken"}, "warn": {"broken", "drift"}}
        return self.on_drift in reported and reported[self.on_drift] <= self._warned_of

    def _judge(self, squares: Tensor) -> None:
        if self._has_warned_of_all():
            return
        broken = squares[:-1].isfinite().logical_not_().any(dim=1).nonzero()
        if len(broken):
            n = int(broken[-1])
            self._act(
                "broken",
                f"{self._where}: the reconstruction of step {n} met NaN, Inf or a norm too large to be "
                f"squared, gradients of steps 0 to {n} are wrong; "
                'use gradient="checkpoint", more corrections, anchors, or a smaller step',
            )
        elif self.on_drift != "ignore" and self._measured:
            defects = self._ratios(squares)[:-1]
            worst = int(defects.argmax())
            defect = defects[worst].item()
            if defect > self.max_drift:
                self._act(
                    "drift",
                    f"{self._where}: the defect of step {worst} must be at most max_drift={self.max_drift:g}, got "
                    f"{defect:.1e}, so gradients may be as far off; choose a solver with resode_cuda.calibrate, or "
                    "use more corrections, anchors, or a smaller step",
                )

    def _act(self, what: str, message: str) -> None:
        if self.on_drift == "raise":
            raise DriftError(message)
        is_news = what not in self._warned_of
        if self.on_drift == "checkpoint":
            is_news, self.fallback_requested = not self.fallback_requested, True
            message += '; gradient="checkpoint" from the next step on'
        if is_news:
            self._warned_of.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _monitor(where: str, steps: int, max_drift: float, on_drift: str, factor: float | None) -> DriftMonitor:
    monitor = DriftMonitor(where, steps, max_drift, on_drift)
    monitor.gradient_error_per_defect = factor
    return monitor


def root_mean_square(defects: Tensor) -> Tensor:
    return defects.square().mean().sqrt()


class HasDrift(Protocol):
    @property
    def drift(self) -> Drift | None: ...


class DriftLogger:
    """Writes the drift of a stack to any callable, such as `SummaryWriter.add_scalar` of TensorBoard.

        from torch.utils.tensorboard import SummaryWriter

        log = DriftLogger(stack, SummaryWriter().add_scalar)
        for training_step, batch in enumerate(batches):
            ...
            loss.backward()
            log(training_step)

    Args:
        stack: the `ResidualStack` to watch.
        write: is called as write(tag, value, training_step) with a str, a float and an int.
        every: training steps from one reading to the next; reading waits for the device.
        tag: put before every name. Tags are `<tag>/maximum`, `<tag>/defect/<n>` for each step n of the stack and, where
            the stack knows them, `<tag>/reconstruction` and `<tag>/gradient_error`.

    Raises:
        ValueError: if every is below 1.
    """

    def __init__(
        self, stack: HasDrift, write: Callable[[str, float, int], object], *, every: int = 1, tag: str = "drift"
    ) -> None:
        if every < 1:
            raise ValueError(f"DriftLogger: every must be >= 1, got {every}; use 1 to log each training step")
        self._stack, self._write, self._every, self._tag = stack, write, every, tag

    def __call__(self, training_step: int) -> None:
        """Log the last backward pass, if it is this training step's turn and the stack measured something."""
        if training_step % self._every:
            return
        drift = self._stack.drift
        if drift is None:
            return
        self._write(f"{self._tag}/maximum", drift.maximum.item(), training_step)
        for name in ("reconstruction", "gradient_error"):
            value = getattr(drift, name)
            if value is not None:
                self._write(f"{self._tag}/{name}", value.item(), training_step)
        for n, defect in enumerate(drift.defects.tolist()):
            self._write(f"{self._tag}/defect/{n}", defect, training_step)
