"""The network as autograd differentiates it: `gradient="backprop"`, and what the fused ops are tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...method import Method
from ...schemes import BlockFunction
from ..activations import ACTIVATIONS
from ..network import Network
from ..norms import EPSILON


def plain(network: Network, method: Method, x: Tensor) -> Tensor:
    """x_N from x_0, every state stored, differentiable to any order.

    Args:
        x: x_0, shape [*, dim], in the stream's dtype.
    """
    functions = [layer_function(network, n) for n in range(network.layers)]
    for n, h in enumerate(method.steps):
        x = method.scheme.add(x, method.scheme.stages(functions[method.blocks_of(n)], x, h), h)
    return x


def layer_function(network: Network, n: int) -> BlockFunction:
    """f_n."""
    weight_in, bias_in, weight_out, bias_out = (None if p is None else p[n] for p in network.parameters)
    assert weight_in is not None
    assert weight_out is not None
    activation = ACTIVATIONS[network.activation].module()

    def f(x: Tensor) -> Tensor:
        if network.norm == "rms":
            x = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
        elif network.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        hidden: Tensor = activation(F.linear(x.to(network.dtype), weight_in, bias_in))
        return F.linear(hidden, weight_out, bias_out)

    return f
