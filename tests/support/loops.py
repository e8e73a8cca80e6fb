"""A converted model beside its twin, for any loop over its layers."""

import copy

import torch

from resode_cuda import conversion, convert
from tests.models.layers import Layer, Model

STACKED, BY_LAYER = "as a stack", "layer by layer"


def rows(count=4):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model, x):
    """Output, and the gradients of all parameters."""
    torch.manual_seed(2)
    out = model(x)
    out.square().sum().backward()
    return out, [parameter.grad for parameter in model.parameters()]


def check(loop, last_pass=STACKED, layer=Layer, within=None):
    """A converted model beside its twin: the output to the last bit, and the gradients.

    They are exact where every state is kept, and with 8 stored bits within a hundredth, wherever chains begin and end.
    """
    if within is None:
        check(loop, last_pass, layer, within=1e-2)
    torch.manual_seed(0)
    twin = Model(6, dropout=0.2, loop=loop, layer=layer).double()
    model = convert(copy.deepcopy(twin), ["layers"], **({"anchors": 1} if within is None else {}))
    out, gradients = trained(model, rows())
    wanted, exact_gradients = trained(twin, rows())
    assert torch.equal(out, wanted)
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if other is not None:
            assert (gradient - other).norm() <= (within or 1e-12) * other.norm().clamp_min(1e-12)
    assert last_pass in conversion(model).stages[0].last_pass
    return model
