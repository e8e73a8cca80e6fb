"""What no kernels of the depth-fused ops can compute, and no GPU before them."""

from __future__ import annotations

import torch

from ..reverse import Reverse
from .network import Network

OLDEST = (8, 0)
"""Compute capability of the first GPUs with asynchronous copies into shared memory."""


def cause(
    kernels: str, network: Network, device: torch.device, solver: Reverse | None, accelerates: bool = False
) -> str | None:
    """Why kernels of this name can't compute it; None where nothing of this kind is in the way.

    Args:
        accelerates: whether they accelerate corrections.
    """
    if device.type != "cuda":
        return f"{kernels} run on CUDA devices, got tensors on {device}"
    if network.dtype == torch.float64:
        return f"{kernels} take parameters of float32, bfloat16 or float16, got float64"
    if solver is not None and solver.accelerate and not accelerates:
        return (
            f"{kernels} do not accelerate corrections, which is the default from 2 on; use "
            "Reverse(..., accelerate=False)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        needs, got = (f"{major}.{minor}" for major, minor in (OLDEST, capability))
        return f'{kernels} need compute capability {needs}, got {got}; on this GPU backend="torch" computes all of it'
    return None
