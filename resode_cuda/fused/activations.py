"""The activations of a residual MLP stack in plain torch, each with its backward pass, and the table of their names.

All map 0 to 0: kernels may pad the hidden dimension with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """a = s(z), elementwise."""

    forward: Callable[[Tensor, Tensor], object]
    """forward(z, out): s(z) into `out`, which may be z."""
    backward: Callable[[Tensor, Tensor, Tensor], object]
    """backward(cotangent, z, a): the cotangent becomes that of z, in place."""
    module: Callable[[], nn.Module]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda z, out: aten.gelu.out(z, approximate=approximate, out=out),
        lambda c, z, a: aten.gelu_backward.grad_input(c, z, approximate=approximate, grad_input=c),
        partial(nn.GELU, approximate),
    )


ACTIVATIONS = {
    "identity": Activation(lambda z, out: z if out is z else out.copy_(z), lambda c, z, a: c, nn.Identity),
    "relu": Activation(
        lambda z, out: torch.clamp(z, min=0, out=out),
        lambda c, z, a: aten.threshold_backward.grad_input(c, a, 0, grad_input=c),
        nn.ReLU,
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": Activation(
        lambda z, out: aten.silu.out(z, out=out),
        lambda c, z, a: aten.silu_backward.grad_input(c, z, grad_input=c),
        nn.SiLU,
    ),
    "tanh": Activation(
        lambda z, out: torch.tanh(z, out=out),
        lambda c, z, a: aten.tanh_backward.grad_input(c, a, grad_input=c),
        nn.Tanh,
    ),
}
