"""Exact gradients from one stored state per step: each step's increment is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..method import Method
from .blocks import Block, BlockCall, Call, held_parameters, modified_in_place
from .replay import swapped


def propagate(
    method: Method, blocks: Sequence[Block], x: Tensor, call: Call, argument_tensors: Sequence[Tensor]
) -> Tensor:
    """x_N from x_0, with torch's non-reentrant checkpointing of every step.

    The blocks replay themselves, buffers included, which torch's own preserve_rng_state does not.
    """
    for n in range(len(method)):
        step = _Step(method, n, blocks, x.device, call, argument_tensors)
        x = checkpoint(step, x, use_reentrant=False, preserve_rng_state=False)
    return x


class _Step:
    """x_{n+1} from x_n, by the same tensors whenever it is called; torch's checkpointing looks after x alone."""

    def __init__(
        self,
        method: Method,
        n: int,
        blocks: Sequence[Block],
        device: torch.device,
        call: Call,
        argument_tensors: Sequence[Tensor],
    ) -> None:
        self.scheme, self.h = method.scheme, method.steps[n]
        used = blocks[method.blocks_of(n)]
        self.functions = [BlockCall(block, device).function(call) for block in used]
        self.parameters = held_parameters(used)
        watched = [*argument_tensors, *(parameter.tensor for parameter in self.parameters)]
        self.versions = [(tensor, tensor._version) for tensor in watched]

    def __call__(self, x: Tensor) -> Tensor:
        if any(tensor._version != version for tensor, version in self.versions):
            raise modified_in_place()
        held = [(slot, parameter.tensor) for parameter in self.parameters for slot in parameter.slots]
        with swapped([slot for slot, _ in held], [tensor for _, tensor in held]):
            return self.scheme.add(x, self.scheme.stages(self.functions, x, self.h), self.h)
