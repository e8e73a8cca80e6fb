"""Which backends compute which op."""

from __future__ import annotations

import torch

from . import fused, ops


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """For each op of `torch.ops.resode` its backends, and why one can't run; None where it can.

    A pointwise op takes the first that can. The ops on whole stacks try their backends in an order that depends on the
    number of rows, and pass over one that can't compute the network.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    return {**ops.backends(device), **fused.backends(device)}
