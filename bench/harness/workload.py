"""What a benchmark measures: a model around a `ResidualStack`, and batches to take training steps on.

One model serves every mode, so all of them have the same weights to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack

from .memory import StepMemory
from .modes import BASELINE, MODES, set_mode
from .timing import ratios

Loss = Callable[[Tensor, Tensor], Tensor]


class Workload:
    """Training steps without the optimizer, whose work is the same in every mode.

    Args:
        model: contains the stack, or is it.
        stack: the stack whose mode is set.
        batches: pairs (input, target), taken in turn.
        loss: of the model's output and the target.
    """

    def __init__(
        self, model: nn.Module, stack: ResidualStack, batches: Sequence[tuple[Tensor, Tensor]], loss: Loss
    ) -> None:
        self.model, self.stack, self.loss = model, stack, loss
        self._batch = batches[0]
        self._batches = cycle(batches)
        # Gradients accumulate in memory that is there before the step, as with zero_grad(set_to_none=False).
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def next_batch(self) -> None:
        self._batch = next(self._batches)

    def forward(self, mode: str) -> Tensor:
        set_mode(self.stack, mode)
        inputs, targets = self._batch
        return self.loss(self.model(inputs), targets)

    def step(self, mode: str) -> None:
        self.forward(mode).backward()

    def steps(self) -> dict[str, Callable[[], None]]:
        """A training step in each mode."""
        return {mode: partial(self.step, mode) for mode in MODES}

    def gradients(self, mode: str) -> list[Tensor]:
        """All parameter gradients on the current batch."""
        return list(torch.autograd.grad(self.forward(mode), list(self.model.parameters())))


def step_figures(
    mode: str, memories: Mapping[str, StepMemory], seconds: Mapping[str, Sequence[float]] | None
) -> dict[str, Any]:
    """What one mode's step took, as results.json keeps it: bytes and, where it was timed, seconds of each round and
    time against backprop."""
    figures: dict[str, Any] = {
        "mode": mode,
        "peak_bytes": memories[mode].peak,
        "held_bytes": memories[mode].held,
    }
    if seconds is not None:
        figures["seconds"] = seconds[mode]
        figures["relative_time"] = vars(ratios(seconds[mode], seconds[BASELINE]))
    return figures
