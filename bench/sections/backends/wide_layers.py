"""Layers too wide for a tile on chip, beside the same layers compiled, stored or checkpointed."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ...harness.arms import OUT_OF_MEMORY, Arm
from ...harness.mlp_networks import PLAIN, SEGMENT, Batches, Layers, Size, batch_of, fused_step, peak_bytes
from ...options import Options
from .backend_arms import MODE, backend_arms, figures_of, network_of, size_of


def wide_size(options: Options, device: torch.device) -> Size:
    return size_of(64, 256, 16, 64, device) if options.quick else size_of(2048, 8192, 16, 16384, device)


def measure(options: Options, device: torch.device, until: float) -> dict[str, Any]:
    size = wide_size(options, device)
    figures = _times(size, options, device, until)
    gc.collect()  # compiled functions are in cycles, and hold the layers
    torch.cuda.empty_cache()
    return {**figures, "memory": [_memory(size, depth, options, device) for depth in (size.depth // 2, size.depth)]}


def _times(size: Size, options: Options, device: torch.device, until: float) -> dict[str, Any]:
    torch.compiler.reset()
    # With --quick, the same graphs without the wait for code to be generated and compiled.
    compiler = "eager" if options.quick else "inductor"
    mlp = network_of(size, options, device)
    batches = Batches(size.rows, mlp, count=2)
    layers = Layers(mlp)
    arms = backend_arms(mlp, batches, size.rows)
    for mode in PLAIN:
        step = layers.step(mode, compiler, SEGMENT)
        arms.append(Arm(f"compiled by {SEGMENT}", mode, batches.on_current(step)))
    return {"compiler": compiler, **figures_of(size, arms, options, device, until, batches.advance)}


def _memory(size: Size, depth: int, options: Options, device: torch.device) -> dict[str, Any]:
    """Peak of a step as it is, and of one that asks for the input's gradient alone."""
    row: dict[str, Any] = {"depth": depth, "state_bytes": size.rows * size.dim * torch.float32.itemsize}
    try:
        mlp = size.network(depth, options.seed, device)
        batch, step = batch_of(size.rows, mlp), fused_step(mlp, MODE)
        row["peak_bytes"] = peak_bytes(step, batch, device)
        step.clear(batch)
        mlp.requires_grad_(False)
        row["frozen_peak_bytes"] = peak_bytes(step, batch, device)
    except torch.OutOfMemoryError:
        row["reason"] = OUT_OF_MEMORY
    return row
