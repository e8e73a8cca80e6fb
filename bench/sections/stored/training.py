"""Whole trainings with stored increments, exact or rounded forward passes, and fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse

from ...harness import trained
from ...harness.trained import Batch, Network

EXACT = "backprop"
MODES: dict[str, Reverse | None] = {
    EXACT: None,
    **{f"stored, {bits} bits": Reverse("stored", bits=bits) for bits in (8, 4, 2, 1)},
    **{f"rounded, {bits} bits": Reverse("stored", bits=bits, rounded_forward=True) for bits in (8, 4, 2)},
    "nothing stored": Reverse("step"),
}
STORED_MODES = tuple(mode for mode in MODES if mode.startswith("stored"))
JUDGED = 20
"""Batches that a loss is the mean of."""
FINETUNING_STEPS, FINETUNING_RATE = 40, 2e-3


@dataclass(frozen=True)
class Run:
    make: Callable[[], Network]
    steps: int


HELD_OUT = 0.2
RUNS = {
    "GPT": Run(lambda: trained.gpt(layers=4, dim=64, rows=12, held_out=HELD_OUT), 300),
    "conv GN": Run(lambda: trained.conv(trained.group_norm, held_out=HELD_OUT), 200),
    "ViT": Run(lambda: trained.vit(held_out=HELD_OUT), 300),
}


def run(name: str, mode: str, seed: int, share: float) -> dict[str, Any]:
    """One training; its loss on batches that were held out."""
    torch.manual_seed(seed)
    network = RUNS[name].make()
    held_out = [network.draw_held_out() for _ in range(JUDGED)]
    _train(network, mode, max(2, int(share * RUNS[name].steps)), trained.LEARNING_RATE)
    return {"run": name, "mode": mode, "seed": seed, "loss": _loss(network, held_out)}


def finetune(mode: str, seed: int, share: float) -> dict[str, Any]:
    """A trained GPT goes on for a few steps at a small rate."""
    torch.manual_seed(seed)
    network = RUNS["GPT"].make()
    held_out = [network.draw_held_out() for _ in range(JUDGED)]
    _train(network, EXACT, max(2, int(share * 300)), trained.LEARNING_RATE)
    before = _loss(network, held_out)
    _train(network, mode, max(2, int(share * FINETUNING_STEPS)), FINETUNING_RATE)
    return {"mode": mode, "before": before, "after": _loss(network, held_out)}


def _train(network: Network, mode: str, steps: int, rate: float) -> None:
    solver = MODES[mode]
    gradient = "backprop" if solver is None else "adjoint"
    stack = ResidualStack(list(network.blocks), step=1.0, gradient=gradient, reverse=solver, on_drift="ignore")
    optimizer = torch.optim.AdamW(network.parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        inputs, targets = network.draw()
        optimizer.zero_grad()
        network.loss(network.head(stack(network.stem(inputs))), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _loss(network: Network, batches: list[Batch]) -> float:
    evaluated = copy.deepcopy(network)
    for module in evaluated.modules:
        module.eval()
    stack = ResidualStack(list(evaluated.blocks), step=1.0)
    losses = [evaluated.loss(evaluated.head(stack(evaluated.stem(inputs))), targets) for inputs, targets in batches]
    return torch.stack(losses).mean().item()
