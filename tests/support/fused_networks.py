"""Networks for the depth-fused ops, their gradients by these ops, and the same by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resode_cuda import Reverse, fused
from resode_cuda.fused.reference.plain import plain
from tests.support.networks import block_count, gradients, relative_error
from tests.support.stepped_network import SteppedNetwork

EXACT = Reverse("step", corrections=30)
"""Converged: what it rebuilds is exact to rounding."""
EXACT_EXTRAPOLATING = Reverse("extrapolate", corrections=30)
TIGHT = 1e-12
ROUNDING = 1e-13
"""Some hundred roundings of float64: what sums in another order differ by."""


def network(
    scheme: str = "euler",
    activation: str = "tanh",
    norm: str | None = None,
    bias: bool = True,
    *,
    dim: int = 6,
    hidden: int = 10,
    steps: int = 5,
    step: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> SteppedNetwork:
    """Random parameters that require gradients. h times the Lipschitz constant of a layer is below 1."""
    layers = block_count(scheme, steps)

    def parameter(*shape: int, inputs: int) -> Tensor:
        return (0.7 * torch.randn(shape, dtype=torch.float64) / inputs**0.5).to(dtype).requires_grad_()

    return SteppedNetwork(
        parameter(layers, hidden, dim, inputs=dim),
        parameter(layers, hidden, inputs=dim) if bias else None,
        parameter(layers, dim, hidden, inputs=hidden),
        parameter(layers, dim, inputs=hidden) if bias else None,
        activation,
        norm,
        scheme,
        tuple(step or (1 / steps,) * steps),
    )


def state(net: SteppedNetwork, *shape: int) -> Tensor:
    """A random x_0 that requires gradients."""
    return torch.randn(*shape, net.dim, dtype=torch.float64).to(net.stream_dtype).requires_grad_()


def in_float64(net: SteppedNetwork, x: Tensor) -> tuple[SteppedNetwork, Tensor]:
    """The same values, as leaves of their own."""
    *parameters, x = (
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (*net.parameters, x)
    )
    return net.with_parameters(parameters), x


def present(net: SteppedNetwork) -> list[Tensor]:
    return [parameter for parameter in net.parameters if parameter is not None]


def wanted(net: SteppedNetwork, x: Tensor) -> list[Tensor]:
    return [tensor for tensor in (x, *present(net)) if tensor.requires_grad]


def run(
    net: SteppedNetwork,
    x: Tensor,
    solver: Reverse | str = EXACT,
    anchors: Sequence[int] = (),
    squares: Tensor | None = None,
) -> Tensor:
    """x_N by the op on plain torch; a solver "checkpoint" is the exact adjoint."""
    gradient = "checkpoint" if solver == "checkpoint" else "adjoint"
    solver = solver if isinstance(solver, Reverse) else EXACT
    x_last, _ = fused.mlp_stack(x, net, net.method(solver, anchors), gradient, "torch", squares)
    return x_last


def fused_gradients(net: SteppedNetwork, x: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    return gradients(lambda: run(net, x, *args, **kwargs), wanted(net, x))


def plain_gradients(net: SteppedNetwork, x: Tensor) -> tuple[Tensor, ...]:
    return gradients(lambda: plain(net, net.method(), x), wanted(net, x))


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert len(got) == len(exact)
    return max(relative_error([a], [b]) for a, b in zip(got, exact, strict=True))


class Calls(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def products(self):
        """How many of them multiplied matrices."""
        assert not {"bmm", "baddbmm", "baddbmm_", "linear", "einsum"} & set(self.names)
        return sum(name in ("mm", "matmul", "addmm", "addmm_") for name in self.names)
