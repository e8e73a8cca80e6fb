"""Gradient errors of the digits nets of `bench.sections.digits`, beside what bfloat16 autocast costs anyway."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..harness.gradients import relative_error
from ..harness.models import DigitsNet, digits_loss
from ..sections.digits import BATCH_ROWS, Split
from .solvers import SOLVERS

BATCHES = 5
LARGEST = 1e3
"""What errors are cut off at, so that those of solvers that diverge stay numbers."""


def errors(net: DigitsNet, data: Split, modes: Sequence[str]) -> dict[str, float]:
    """Relative error of all gradients of the stack in each mode, float64, the median over batches.

    "autocast" is backprop's own in bfloat16 autocast of float32.
    """
    wide, found = copy.deepcopy(net).double(), []
    for batch in range(BATCHES):
        rows = slice(batch * BATCH_ROWS, (batch + 1) * BATCH_ROWS)
        images, labels = data.train_images[rows], data.train_labels[rows]
        exact = _gradients(wide, "backprop", images.double(), labels)
        of_batch = {mode: _gradients(wide, mode, images.double(), labels) for mode in modes}
        of_batch["autocast"] = _gradients(net, "backprop", images, labels, autocast=True)
        found.append({mode: _bounded(relative_error(got, exact)) for mode, got in of_batch.items()})
    return {mode: statistics.median(of_batch[mode] for of_batch in found) for mode in found[0]}


def _gradients(net: DigitsNet, mode: str, images: Tensor, labels: Tensor, autocast: bool = False) -> Sequence[Tensor]:
    stack = net.stack[0]
    SOLVERS[mode].apply(stack)
    with torch.autocast(images.device.type, torch.bfloat16) if autocast else nullcontext():
        loss = digits_loss(net(images), labels)
    return torch.autograd.grad(loss, list(stack.parameters()))


def _bounded(error: float) -> float:
    return min(error, LARGEST) if math.isfinite(error) else LARGEST
