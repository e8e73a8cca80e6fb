"""Triton's kernels compiled ahead, side by side: the benchmark then finds them in Triton's cache.

Of one dim they take seconds, of all dims in turn longer than what is to be measured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from ...harness.mlp_networks import Size, batch_of, fused_step, unusable

WORKERS = 8
SECONDS = 40
"""What is not compiled by then is compiled when it is needed."""


def compile_ahead(sizes: Sequence[Size], mode: str, device: torch.device) -> None:
    """The kernels of a step and of a forward pass alone; those of each dim in a process of its own."""
    by_dim: dict[int, list[Size]] = {}
    for size in sizes:
        by_dim.setdefault(size.dim, []).append(size)
    pool = ProcessPoolExecutor(min(WORKERS, len(by_dim)), mp_context=multiprocessing.get_context("spawn"))
    wait([pool.submit(_run, group, mode, device) for group in by_dim.values()], timeout=SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)


def _run(sizes: Sequence[Size], mode: str, device: torch.device) -> None:
    for size in sizes:
        mlp = size.network(size.depth, 0, device)
        if unusable(mlp, mode)["triton"] is not None:
            return
        batch, step = batch_of(size.rows, mlp), fused_step(mlp, mode, "triton")
        step(batch)
        with torch.no_grad():
            step.function(batch[0])
