"""Few rows: every backend beside plain backprop and both beside their CUDA graphs; and a forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...harness.arms import Arm
from ...harness.captured import Captured
from ...harness.fused_backends import usable
from ...harness.mlp_networks import Batches, Layers, Size, Step, fused_step
from ...harness.modes import BASELINE
from ...options import Options
from .backend_arms import MODE, backend_arms, figures_of, network_of, size_of


def training_size(options: Options, device: torch.device) -> Size:
    return size_of(16, 32, 16, 32, device) if options.quick else size_of(64, 128, 256, 1024, device)


def forward_size(options: Options, device: torch.device) -> Size:
    return size_of(16, 32, 16, 8, device) if options.quick else size_of(32, 64, 1000, 64, device)


def measure_training(options: Options, device: torch.device, until: float) -> dict[str, Any]:
    """A training step by everything that can take one."""
    size = training_size(options, device)
    mlp = network_of(size, options, device)
    batches = Batches(size.rows, mlp)
    arms = backend_arms(mlp, batches, size.rows)
    arms.append(Arm("eager", BASELINE, batches.on_current(Layers(mlp).step(BASELINE))))
    graphs: list[Captured] = []
    if device.type == "cuda":
        graphs.append(Captured(Layers(mlp).step(BASELINE), batches.current))
        arms.append(Arm("captured eager", BASELINE, graphs[-1]))
        for name in usable(mlp, MODE):
            step = fused_step(network_of(size, options, device), MODE, name)
            graphs.append(Captured(step, batches.current))
            arms.append(Arm("captured", MODE, graphs[-1], name))

    def before_round() -> None:
        batches.advance()
        for graph in graphs:
            graph.load(batches.current)

    return figures_of(size, arms, options, device, until, before_round)


def measure_forward(options: Options, device: torch.device, until: float) -> dict[str, Any]:
    """A forward pass without gradients, by every backend."""
    size = forward_size(options, device)
    mlp = network_of(size, options, device)
    batches = Batches(size.rows, mlp)
    arms = [
        Arm("forward", "no gradient", _without_gradients(fused_step(mlp, MODE, name), batches), name)
        for name in usable(mlp, "checkpoint")  # where nothing is differentiated, nothing is rebuilt either
    ]
    return figures_of(size, arms, options, device, until, batches.advance)


def _without_gradients(step: Step, batches: Batches) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return step.function(batches.current[0])

    return call
