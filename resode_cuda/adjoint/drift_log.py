"""Writing a stack's drift to a training log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .drift import Drift


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
