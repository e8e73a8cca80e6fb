"""Triton's kernels compiled ahead, side by side: the benchmark then finds them in Triton's cache.

Those of one dim compile in seconds, those of all dims in turn in longer than the measurements take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...harness.fused_backends import reasons_against
from ...harness.mlp_networks import Size, batch_of, fused_step
from ...harness.workers import run_within

WORKERS = 8
SECONDS = 40
"""What is not compiled by then is compiled when it is needed."""


def compile_ahead(sizes: Sequence[Size], mode: str, device: torch.device) -> None:
    """Compile the kernels of a step and of a forward pass alone, those of each dim in a process of its own."""
    by_dim: dict[int, list[Size]] = {}
    for size in sizes:
        by_dim.setdefault(size.dim, []).append(size)
    run_within(SECONDS, _run, [(group, mode, device) for group in by_dim.values()], WORKERS)


def _run(sizes: Sequence[Size], mode: str, device: torch.device) -> None:
    for size in sizes:
        mlp = size.network(size.depth, 0, device)
        if reasons_against(mlp, mode)["triton"] is not None:
            return
        batch, step = batch_of(size.rows, mlp), fused_step(mlp, mode, "triton")
        step(batch)
        with torch.no_grad():
            step.function(batch[0])
