"""What a stack's forward pass gives beside x_N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """The results of a forward pass."""

    last: Tensor
    """x_N."""
    auxiliaries: list[Tensor | None]
    """What each evaluation of a block returned beside its increment, in the order of evaluation."""
    states: dict[int, Tensor]
    """x_n for each number n that was asked for."""
    are_functions: bool = True
    """Whether all blocks were functions of their arguments: they drew no random numbers and wrote no buffers."""


def together(auxiliaries: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, of which none has a gradient without the others: a way back starts at the last one's step."""
    return list(_Together.apply(*auxiliaries))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return cotangents  # zeros for those that are missing

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tangents
