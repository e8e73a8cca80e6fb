"""The depth-fused ops by Triton."""

from __future__ import annotations

import torch

from ..reverse import Reverse
from .network import Network


def cause(network: Network, device: torch.device, solver: Reverse | None) -> str | None:
    """Why Triton's kernels can't compute this; None if they can."""
    return "there are no kernels by Triton for whole stacks yet"
