"""What the parts of the section `backends` share: their networks, their backends, and how they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from resode_cuda import ResidualMLP

from ...harness.arms import NO_TIME, Arm, described, take_turns
from ...harness.fused_backends import step_by, taken_by_auto, triton_gradient_forms, usable
from ...harness.mlp_networks import Batches, Size, fused_step
from ...harness.timing import clock_of
from ...options import Options

MODE = "extrapolated"
ACTIVATION = "silu"
SECONDS_AT_A_TIME = 4e-3
"""About how long the calls between two readings of the clock take; the readings take a hundredth of it."""
MOST_AT_A_TIME = 20


def size_of(dim: int, hidden: int, depth: int, rows: int, device: torch.device) -> Size:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Size(dim, hidden, depth, rows, dtype, ACTIVATION)


def network_of(size: Size, options: Options, device: torch.device) -> ResidualMLP:
    return size.network(size.depth, options.seed, device)


def backend_arms(mlp: ResidualMLP, batches: Batches, rows: int) -> list[Arm]:
    """A step by each backend that can run, in each of its forms, and by what "auto" takes."""
    names = [
        name
        for backend in usable(mlp, MODE)
        for name in (triton_gradient_forms(mlp) if backend == "triton" else [backend])
    ]
    arms = [Arm("fused", MODE, batches.on_current(step_by(mlp, MODE, name)), name) for name in names]
    auto = batches.on_current(fused_step(mlp, MODE, "auto"))
    return [*arms, Arm("auto", MODE, auto, taken_by_auto(mlp, MODE, rows))]


def figures_of(
    size: Size,
    arms: Sequence[Arm],
    options: Options,
    device: torch.device,
    until: float,
    before_round: Callable[[], None],
) -> dict[str, Any]:
    """Each arm's seconds; one that is not begun by `until` gets none."""
    clock = clock_of(device)
    for arm in arms:
        if time.perf_counter() > until:
            arm.reason = NO_TIME
            continue
        arm.first(clock)
        arm.settle(clock, SECONDS_AT_A_TIME, 1 if options.quick else MOST_AT_A_TIME)
    by_arm = take_turns(arms, options.rounds + 2, device, before_round)
    return {**size.facts, "rows": [described(arm, by_arm) for arm in arms]}
