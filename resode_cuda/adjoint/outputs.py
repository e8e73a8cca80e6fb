"""What a stack's forward pass gives beside x_N."""

from __future__ import annotations

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


def together(outputs: Outputs) -> Outputs:
    """The same tensors, of which no auxiliary has a gradient without x_N: the way back starts at the last step."""
    places = [place for place, auxiliary in enumerate(outputs.auxiliaries) if auxiliary is not None]
    if not places:
        return outputs
    auxiliaries = list(outputs.auxiliaries)
    last, *given = _Together.apply(outputs.last, *(auxiliaries[place] for place in places))
    for place, auxiliary in zip(places, given, strict=True):
        auxiliaries[place] = auxiliary
    return outputs._replace(last=last, auxiliaries=auxiliaries)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, *auxiliaries: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = last.shape, last.dtype
        return tuple(tensor.detach() for tensor in (last, *auxiliaries))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            # Made from a cotangent, which may be one of a batch of them.
            like = next(cotangent for cotangent in cotangents if cotangent is not None)
            g = like.new_zeros(ctx.shape, dtype=ctx.dtype)
        return g, *cotangents
