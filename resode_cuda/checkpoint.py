"""Exact gradients from one stored state per step: each step's increment is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .blocks import Block, BlockCall, Call
from .schemes import Scheme


def propagate(scheme: type[Scheme], blocks: Sequence[Block], steps: Sequence[float], x: Tensor, call: Call) -> Tensor:
    """x_N from x_0, with torch's non-reentrant checkpointing of every step.

    The blocks replay themselves, buffers included, which torch's own preserve_rng_state does not.
    """
    for n, h in enumerate(steps):
        used = [BlockCall(block, x.device).function(call) for block in blocks[n : n + scheme.blocks_per_step]]
        x = x + checkpoint(scheme.increment, used, x, h, use_reentrant=False, preserve_rng_state=False)
    return x
