"""The table of sizes: every backend that can run, and "auto", so that a choice can be made from measurements."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from resode_cuda import ResidualMLP

from ...harness.fused_backends import reasons_against
from ...harness.mlp_networks import Batches, Size
from ...harness.timing import spread
from ...options import Options
from .backend_arms import ACTIVATION, MODE, backend_arms, figures_of, network_of, size_of

DIMS = (64, 128, 32, 16, 256, 1024, 2048)
WIDER_DIMS = (64, 128, 1024)
"""Dims that are measured with hidden 4 times as large too."""
ROWS = (16, 64, 1024, 16384, 262_144)
WIDE_ROWS = ROWS[:-1]
"""Rows of layers that are too wide for the chip, which do more of the same where there are more."""
LARGEST_ON_CHIP = 256
FLOP = 2e12
"""Arithmetic of a step, by which its depth is chosen."""
WEIGHTS = 2**27
"""Weights of a network, at most."""
DEEPEST, SHALLOWEST, SHALLOWEST_WIDE = 256, 16, 4


def all_sizes(options: Options, device: torch.device) -> list[Size]:
    """All sizes, from the most to the least important."""
    if options.quick:
        return [size_of(16, 32, 16, 16, device), size_of(32, 128, 16, 64, device)]
    found = []
    for factor, dims in ((2, DIMS), (4, WIDER_DIMS)):
        for dim in dims:
            for rows in ROWS if dim <= LARGEST_ON_CHIP else WIDE_ROWS:
                found.append(size_of(dim, factor * dim, depth_of(dim, factor * dim, rows), rows, device))
    return found


def depth_of(dim: int, hidden: int, rows: int) -> int:
    """A power of two, so that a step takes about as long at every size."""
    depth = DEEPEST
    least = SHALLOWEST if dim <= LARGEST_ON_CHIP else SHALLOWEST_WIDE
    while depth > least and (8 * 2 * rows * dim * hidden * depth > FLOP or 2 * dim * hidden * depth > WEIGHTS):
        depth //= 2
    return depth


def measure(options: Options, device: torch.device, until: float) -> dict[str, Any]:
    """A row for each size and backend, and for "auto"."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    reasons: set[str] = set()
    mlp: ResidualMLP | None = None
    stopped = False
    for size in all_sizes(options, device):
        if stopped or time.perf_counter() > until:
            left_out.append(size.facts)
            continue
        if mlp is None or (mlp.dim, mlp.hidden, mlp.depth) != (size.dim, size.hidden, size.depth):
            mlp = network_of(size, options, device)
        reasons |= {f"{name}: {reason}" for name, reason in reasons_against(mlp, MODE).items() if reason is not None}
        batches = Batches(size.rows, mlp, count=2)
        try:
            # A size that is begun is finished.
            figures = figures_of(
                size, backend_arms(mlp, batches, size.rows), options, device, math.inf, batches.advance
            )
        except KeyboardInterrupt:  # whoever stops it wants what there is
            stopped = True
            left_out.append(size.facts)
            continue
        rows += [_row(figures, row, capability) for row in figures["rows"]]
    found = {"mode": MODE, "activation": ACTIVATION, "rows": rows, "stopped": stopped}
    return {**found, "left_out": left_out, "reasons": sorted(reasons)}


def _row(figures: dict[str, Any], row: dict[str, Any], capability: tuple[int, int] | None) -> dict[str, Any]:
    is_auto = row["kind"] == "auto"
    return {
        "capability": capability,
        **{name: figures[name] for name in ("dim", "hidden", "depth", "dtype")},
        "rows": figures["batch_rows"],
        "backend": "auto" if is_auto else row["backend"],
        "taken": row["backend"] if is_auto else None,
        "milliseconds": None if row["seconds"] is None else 1e3 * spread(row["seconds"]).median,
        "seconds": row["seconds"],
        "reason": row["reason"],
    }
