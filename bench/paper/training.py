"""Trainings as the authors' are, by stochastic gradient descent with momentum, and test errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch, Images
from .networks import PaperNet

TEST_ROWS = 512


@dataclass(frozen=True)
class Recipe:
    """Epochs, batches and learning rates."""

    epochs: int
    rows: int
    rate: float
    drops: tuple[float, ...] = ()
    """Shares of the epochs after which the rate is divided by `divisor`."""
    divisor: float = 10.0
    cosine: bool = False
    """The rate falls to 0 instead."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    adam: bool = False
    """AdamW instead, whose steps do not shrink with the gradients."""
    residual_rate: float | None = None
    """Factor of 1/h in the rate of the residual functions' parameters; None leaves their rate as the others'.

    Their gradients are O(h), so that deep nets need many epochs to go as far as shallow ones, or such a factor.
    """

    def rate_in(self, epoch: int) -> float:
        share = epoch / self.epochs
        if self.cosine:
            return self.rate * (1 + math.cos(math.pi * share)) / 2
        return self.rate / self.divisor ** sum(share >= drop for drop in self.drops)


def train(
    net: PaperNet, images: Images, recipe: Recipe, seed: int, after_epoch: Callable[[int], None] = lambda epoch: None
) -> None:
    """Train the parameters that require gradients, modules in the mode that they are in.

    Nets side by side have batches of their own, each in an order of its own.
    """
    groups = _groups(net, recipe)
    optimizer: torch.optim.Optimizer
    if recipe.adam:
        optimizer = torch.optim.AdamW(groups, recipe.rate, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * recipe.rate_in(epoch)
        seeds = [(seed + copy) * 100_003 + epoch for copy in range(net.copies)]
        for batches in zip(*(images.training(recipe.rows, each) for each in seeds), strict=True):
            inputs, labels = side_by_side(batches, next(net.parameters()).device)
            optimizer.zero_grad()
            loss_of(net(inputs), labels).backward()
            optimizer.step()
        after_epoch(epoch)


def _groups(net: PaperNet, recipe: Recipe) -> list[dict[str, object]]:
    factors: dict[Tensor, float] = {}
    if recipe.residual_rate is not None:
        for stack in net.stacks:
            factors |= dict.fromkeys(stack.parameters(), recipe.residual_rate / stack.steps[0])
    return [
        {"params": [parameter], "factor": factors.get(parameter, 1.0)}
        for parameter in net.parameters()
        if parameter.requires_grad
    ]


def side_by_side(batches: tuple[Batch, ...], device: torch.device) -> Batch:
    """One batch for nets side by side: images joined in their channels, labels [rows, copies]."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images, 1).to(device), torch.stack(labels, 1).to(device)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [rows, copies, classes], the mean over rows, the sum over copies."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * labels.shape[1]


@torch.no_grad()
def test_errors(net: PaperNet, images: Images) -> list[float]:
    """Percent of the test images that each copy gets wrong, in eval mode."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    device, wrong, count = next(net.parameters()).device, torch.zeros(net.copies), 0
    for inputs, labels in images.testing(TEST_ROWS):
        given, expected = side_by_side(((inputs, labels),) * net.copies, device)
        wrong += (net(given).argmax(2) != expected).sum(0).cpu()
        count += len(labels)
    for module, mode in modes.items():
        module.training = mode
    return (100 * wrong / count).tolist()
