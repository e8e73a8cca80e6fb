"""The residual networks of the paper: a stem, one or more stages of residual functions, a linear head.

Several networks of one architecture can be trained at once: side by side in the channels of one network, whose
convolutions are grouped. They never mix, so each trains as it would alone, and small tensors are computed in one call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack

from ..harness.models import block_count

EXPANSION = 4
"""Channels of a bottleneck's state for each of its inner channels."""


@dataclass(frozen=True)
class Architecture:
    """A network, as settings keep it.

    The residual functions are conv–BN–ReLU–conv–BN, or the authors' bottleneck, ReLU–conv 1×1–BN–ReLU–conv 3×3–BN–
    ReLU–conv 1×1–BN. Between stages a convolution of stride 2 doubles the channels.
    """

    channels: int
    """Channels of an image."""
    classes: int
    widths: tuple[int, ...]
    """Channels of each stage's state."""
    steps: tuple[int, ...]
    """Steps N of each stage."""
    stem: tuple[int, int] = (3, 2)
    """Kernel and stride of the first convolution."""
    pooled: int = 2
    """Side to which the last state is averaged."""
    scheme: str = "euler"
    step: float | None = None
    """h; None is 1/N."""
    tied: bool = False
    """One function for all steps of a stage."""
    last_norm: str = "zero"
    """The scale of each function's last norm at the start, "zero" or "one"; "none" leaves that norm out."""
    bottleneck: bool = False
    copies: int = 1
    """Networks side by side."""

    def build(self, seed: int) -> PaperNet:
        torch.manual_seed(seed)
        return PaperNet(self)


class PaperNet(nn.Sequential):
    """Images [rows, copies · channels, side, side] to logits [rows, copies, classes]."""

    def __init__(self, of: Architecture) -> None:
        kernel, stride = of.stem
        widths = [of.copies * width for width in of.widths]
        padding = 1 if kernel == 5 else kernel // 2  # the authors' 5×5 of stride 3 has the smaller one
        stem = nn.Conv2d(of.copies * of.channels, widths[0], kernel, stride, padding, bias=False, groups=of.copies)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
        if kernel == 7:  # ImageNet's stem
            layers.append(nn.MaxPool2d(3, 2, 1))
        stacks: list[ResidualStack] = []
        for stage, (width, steps) in enumerate(zip(widths, of.steps, strict=True)):
            if stage:
                down = nn.Conv2d(widths[stage - 1], width, 3, 2, 1, bias=False, groups=of.copies)
                layers += [down, nn.BatchNorm2d(width), nn.ReLU()]
            stacks.append(_stage(of, width, steps))
            layers.append(stacks[-1])
        head = nn.Conv2d(widths[-1], of.copies * of.classes, of.pooled, groups=of.copies)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(of.pooled), head)
        self.stacks = stacks
        """In a list, registered once already."""
        self.copies = of.copies

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits.view(len(images), self.copies, -1)

    def replace_stack(self, stage: int, stack: ResidualStack) -> ResidualStack:
        """Put another stack at a stage's place, and return it."""
        place = next(index for index, layer in enumerate(self) if layer is self.stacks[stage])
        self.stacks[stage] = self[place] = stack
        return stack

    def untie(self, stage: int) -> ResidualStack:
        """Give every step of a stage a function of its own, all equal to begin with; the new stack."""
        tied = self.stacks[stage]
        return self.replace_stack(stage, ResidualStack([copy.deepcopy(block) for block in tied], **tied.settings()))


def _stage(of: Architecture, width: int, steps: int) -> ResidualStack:
    function = bottleneck_function if of.bottleneck else residual_function
    count = block_count(of.scheme, steps)
    if of.tied:
        blocks = [function(width, of.copies, of.last_norm)] * count
    else:
        blocks = [function(width, of.copies, of.last_norm) for _ in range(count)]
    return ResidualStack(blocks, of.scheme, step=of.step, gradient="backprop", on_drift="ignore")


def residual_function(width: int, copies: int = 1, last_norm: str = "one") -> nn.Sequential:
    """conv–BN–ReLU–conv–BN, the authors' for CIFAR-10."""
    up, down = (nn.Conv2d(width, width, 3, padding=1, groups=copies) for _ in range(2))
    return _ended(nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU(), down, nn.BatchNorm2d(width)), last_norm)


def bottleneck_function(width: int, copies: int = 1, last_norm: str = "one") -> nn.Sequential:
    """ReLU–conv 1×1–BN–ReLU–conv 3×3–BN–ReLU–conv 1×1–BN, the authors' for networks of several stages."""
    inner = width // EXPANSION
    layers: list[nn.Module] = []
    for before, after, kernel in ((width, inner, 1), (inner, inner, 3), (inner, width, 1)):
        conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False, groups=copies)
        layers += [nn.ReLU(), conv, nn.BatchNorm2d(after)]
    return _ended(nn.Sequential(*layers), last_norm)


def _ended(function: nn.Sequential, last_norm: str) -> nn.Sequential:
    if last_norm == "none":
        return nn.Sequential(*list(function)[:-1])
    if last_norm == "zero":
        nn.init.zeros_(function.get_parameter(f"{len(function) - 1}.weight"))  # its shift is 0 already
    return function
