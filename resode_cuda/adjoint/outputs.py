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


def together(last: Tensor, auxiliaries: Sequence[Tensor]) -> list[Tensor]:
    """The auxiliaries, of which none has a gradient without x_N: a way back starts at the last step."""
    return list(_Together.apply(last, *auxiliaries))


class _Together(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(last: Tensor, *auxiliaries: Tensor) -> tuple[Tensor, ...]:
        return tuple(auxiliary.clone() for auxiliary in auxiliaries)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.last = inputs[0].shape, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        shape, dtype = ctx.last
        return cotangents[0].new_zeros(shape, dtype=dtype), *cotangents  # zeros for those that are missing

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tangents[1:]
