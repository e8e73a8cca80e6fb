"""Which backends compute which op."""

from __future__ import annotations

import torch

from . import fused, ops


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """For each op of `torch.ops.resode` its backends, and why one can't run; None where it can.

    The first that can is taken, by the ops on whole stacks with exceptions: the order that they try changes with the
    number of rows, and a network may be one that a backend can't compute.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    return {**ops.backends(device), **fused.backends(device)}
