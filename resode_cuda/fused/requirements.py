"""What no kernels of the depth-fused ops can compute, and no GPU before them."""

from __future__ import annotations

import torch

from ..devices import reason_against
from ..method import Method
from .network import Network


def reason(
    kernels: str, network: Network, method: Method, device: torch.device, accelerates: bool = False
) -> str | None:
    """Why kernels of this name can't compute it; None where nothing of this kind is in the way.

    Args:
        accelerates: whether they accelerate corrections.
    """
    if device.type != "cuda":
        return reason_against(kernels, device)
    if network.dtype == torch.float64:
        return f"{kernels} take parameters of float32, bfloat16 or float16, got float64"
    if method.solver.accelerate and not accelerates:
        return (
            f"{kernels} do not accelerate corrections, which is the default from 2 on; use "
            "Reverse(..., accelerate=False)"
        )
    return reason_against(kernels, device)
