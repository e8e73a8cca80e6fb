"""The depth-fused ops: a whole stack of residual perceptrons, forward or backward, as one op each.

| op | computes |
|---|---|
| mlp_stack | x_N; the last two increments, newest first, where the solver extrapolates; the anchored states |
| mlp_stack_adjoint | rebuilding the states from x_N and g_N: g_0, all gradients, the norms of defects, and x_0 |
| mlp_stack_exact_adjoint | from x_0 and g_N, each tile of rows running forward again: g_0 and all gradients |

The first is differentiable, by one of the other two, which are not. All are functional; a backward pass of mlp_stack
fills its `norms`, if it has some, and that is all that is ever overwritten. States have shape [*, dim] and the stream's
dtype, float32 for 16-bit parameters, and results are contiguous. A result that is not asked for is empty.

`torch_backend` is the specification; `backend` chooses, and one that is asked for by name runs or raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..reverse import Reverse
from .network import Network
from .selection import causes_on, chosen

__all__ = ["backends", "mlp_stack"]

_NETWORK = (
    "Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, "
    "float[] steps, str scheme, str activation, str? norm, "
)
_SOLVER = "str predictor, int corrections, bool reuse, bool accelerate, int? anchors, "
_GRADIENTS = "Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out"
SCHEMAS = (
    f"mlp_stack(Tensor x, {_NETWORK}str gradient, {_SOLVER}str backend, Tensor? norms) -> "
    "(Tensor x_last, Tensor increments, Tensor anchored)",
    f"mlp_stack_adjoint(Tensor g, Tensor x_last, Tensor increments, Tensor anchored, {_NETWORK}{_SOLVER}"
    f"bool wants_parameters, bool wants_input, str backend) -> (Tensor g, {_GRADIENTS}, Tensor norms, Tensor x)",
    f"mlp_stack_exact_adjoint(Tensor g, Tensor x, {_NETWORK}bool wants_parameters, str backend) -> "
    f"(Tensor g, {_GRADIENTS})",
)
"""gradient: "adjoint" or "checkpoint". norms: shape [steps, 2], |y - x_n|^2 and |x_n|^2 of each step."""

library = torch.library.Library("resode", "FRAGMENT")


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """For each op its backends, in the order for many rows, and why one can't run at all; None where it can.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    causes = causes_on(torch.device("cuda" if device is None else device))
    return {schema.partition("(")[0]: causes for schema in SCHEMAS}


class Call(NamedTuple):
    """The arguments of an op that say what is computed and how."""

    network: Network
    solver: Reverse
    anchors: int | None

    @classmethod
    def of(cls, network: Sequence[Any], solver: Sequence[Any] = ("step", 0, True, False, None)) -> Call:
        *reverse, anchors = solver
        return cls(Network(*network), Reverse(*reverse), anchors)

    @property
    def kept(self) -> int:
        """How many increments the forward pass hands to the backward pass."""
        return min(2, len(self.network.steps)) if self.solver.extrapolates else 0

    @property
    def anchor_count(self) -> int:
        return 0 if self.anchors is None else -(-len(self.network.steps) // self.anchors)


def mlp_stack(
    x: Tensor,
    network: Network,
    *,
    gradient: str,
    solver: Reverse,
    anchors: int | None,
    backend: str,
    norms: Tensor | None = None,
) -> Tensor:
    """x_N from x_0, differentiable once in x and the parameters.

    Args:
        x: x_0, shape [*, dim], in the stream's dtype.
        gradient: "adjoint" rebuilds states in the backward pass, by this solver; "checkpoint" is exact.
        norms: shape [steps, 2], in the stream's dtype, for the backward pass to fill.

    Raises:
        TypeError, ValueError: as `Network.check` and `backend.chosen`.
    """
    settings = solver.predictor, solver.corrections, solver.reuse, bool(solver.accelerate), anchors
    fields = *network.parameters, network.steps, network.scheme, network.activation, network.norm
    x_last: Tensor = torch.ops.resode.mlp_stack(x, *fields, gradient, *settings, backend, norms)[0]
    return x_last


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, gradient, backend = _of_forward(x, rest)
    rebuilds = gradient == "adjoint"
    module = chosen("mlp_stack", backend, call.network, x, call.solver if rebuilds else None)
    kept, anchors = (call.kept, call.anchors) if rebuilds else (0, None)
    x_last, increments, anchored = module.forward(call.network, _rows(x), kept, anchors)
    return x_last.view(x.shape), *(states.view(states.shape[0], *x.shape) for states in (increments, anchored))


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, gradient, _ = _of_forward(x, rest)
    kept, anchor_count = (call.kept, call.anchor_count) if gradient == "adjoint" else (0, 0)
    increments = x.new_empty((kept, *x.shape), dtype=call.network.dtype)
    return x.new_empty(x.shape), increments, x.new_empty((anchor_count, *x.shape))


def _of_forward(x: Tensor, rest: Sequence[Any]) -> tuple[Call, str, str]:
    call, gradient = Call.of(rest[:8], rest[9:14]), rest[8]
    call.network.check("mlp_stack", x)
    if gradient not in ("adjoint", "checkpoint"):
        raise ValueError(f'mlp_stack: gradient must be "adjoint" or "checkpoint", got {gradient!r}')
    if call.anchors is not None and call.anchors < 1:
        raise ValueError(f"mlp_stack: anchors must be >= 1, got {call.anchors}; use None for no anchors")
    return call, gradient, rest[14]


def _adjoint(g: Tensor, x_last: Tensor, increments: Tensor, anchored: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, (wants_parameters, wants_input, backend) = Call.of(rest[:8], rest[8:13]), rest[13:]
    call.network.check("mlp_stack_adjoint", x_last)
    module = chosen("mlp_stack_adjoint", backend, call.network, g, call.solver)
    states = _rows(g), _rows(x_last), *(_stacked_rows(states) for states in (increments, anchored))
    g_first, gradients, norms, x_first = module.adjoint(*call, *states, wants_parameters, wants_input)
    x_first = g.new_empty(0) if x_first is None else x_first.view(g.shape)
    return g_first.view(g.shape), *_filled(gradients, call.network, g), norms, x_first


def _adjoint_fake(g: Tensor, x_last: Tensor, increments: Tensor, anchored: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    network, (wants_parameters, wants_input) = Network(*rest[:8]), rest[13:15]
    network.check("mlp_stack_adjoint", x_last)
    gradients = _gradients_fake(network, g, wants_parameters)
    norms = g.new_empty(len(network.steps), 2)
    return g.new_empty(g.shape), *gradients, norms, g.new_empty(g.shape if wants_input else 0)


def _exact_adjoint(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    network, (wants_parameters, backend) = Network(*rest[:8]), rest[8:]
    network.check("mlp_stack_exact_adjoint", x)
    module = chosen("mlp_stack_exact_adjoint", backend, network, g, None)
    g_first, gradients = module.exact_adjoint(network, _rows(g), _rows(x), wants_parameters)
    return g_first.view(g.shape), *_filled(gradients, network, g)


def _exact_adjoint_fake(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    network = Network(*rest[:8])
    network.check("mlp_stack_exact_adjoint", x)
    return g.new_empty(g.shape), *_gradients_fake(network, g, rest[8])


def _rows(states: Tensor) -> Tensor:
    """[rows, dim], contiguous."""
    return states.reshape(states.numel() // states.shape[-1], states.shape[-1]).contiguous()


def _stacked_rows(states: Tensor) -> Tensor:
    """[states, rows, dim], contiguous."""
    count, dim = states.shape[0], states.shape[-1]
    return states.reshape(count, math.prod(states.shape[1:-1]), dim).contiguous()


def _filled(gradients: Sequence[Tensor | None] | None, network: Network, g: Tensor) -> list[Tensor]:
    """In the parameters' dtype."""
    if gradients is None:
        gradients = (None,) * 4
    empty = [g.new_empty(0, dtype=network.dtype) for _ in range(4)]
    return [e if gradient is None else gradient.to(network.dtype) for gradient, e in zip(gradients, empty, strict=True)]


def _gradients_fake(network: Network, g: Tensor, wants_parameters: bool) -> list[Tensor]:
    return [
        g.new_empty(0 if parameter is None or not wants_parameters else parameter.shape, dtype=network.dtype)
        for parameter in network.parameters
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *rest = inputs
    parameters, (ctx.norms,) = rest[:4], rest[15:]
    ctx.network, ctx.gradient, ctx.solver, ctx.backend = rest[4:8], rest[8], rest[9:14], rest[14]
    ctx.save_for_backward(*parameters, *([x] if ctx.gradient == "checkpoint" else output))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    if any(other is not None and other.numel() for other in others):
        raise RuntimeError(
            "mlp_stack: only x_last has a gradient, got one for increments or anchored; leave them alone"
        )
    if g is None:
        return nothing
    saved = ctx.saved_tensors  # once: of a checkpoint they are unpacked once alone
    parameters, states = saved[:4], saved[4:]
    network = *parameters, *ctx.network
    needs = ctx.needs_input_grad[1:5]
    if ctx.gradient == "checkpoint":
        g_first, *gradients = torch.ops.resode.mlp_stack_exact_adjoint(g, *states, *network, any(needs), ctx.backend)
    else:
        g_first, *gradients, norms, _ = torch.ops.resode.mlp_stack_adjoint(
            g, *states, *network, *ctx.solver, any(needs), False, ctx.backend
        )
        if ctx.norms is not None and not is_legacy_batchedtensor(norms):
            ctx.norms.copy_(norms.detach())
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return g_first if ctx.needs_input_grad[0] else None, *wanted, *nothing[5:]


def _refuse_second(ctx: Any, *cotangents: Any) -> Any:
    raise RuntimeError(
        "mlp_stack: gradients are of first order in reverse mode, got a double backward (create_graph=True); use "
        'gradient="backprop"'
    )


def _forward_vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> Any:
    if any(dims[place] is not None for place in (*range(1, 5), -1)):  # of steps, dims has a list
        raise NotImplementedError(
            'mlp_stack: torch.vmap must batch x alone, got batched parameters; use gradient="backprop"'
        )
    return torch.ops.resode.mlp_stack(x.movedim(dims[0] or 0, 0), *rest), (0, 1, 1)


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        'mlp_stack: torch.vmap must not reach its backward pass, whose gradients are sums; use gradient="backprop"'
    )


_IMPLEMENTATIONS: tuple[tuple[Any, Any], ...] = (
    (_forward, _forward_fake),
    (_adjoint, _adjoint_fake),
    (_exact_adjoint, _exact_adjoint_fake),
)
for _schema, (_implementation, _fake) in zip(SCHEMAS, _IMPLEMENTATIONS, strict=True):
    library.define(_schema)
    _name = _schema.partition("(")[0]
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resode::{_name}", _fake, lib=library)
    _is_forward = _implementation is _forward
    torch.library.register_vmap(f"resode::{_name}", _forward_vmap if _is_forward else _refuse_vmap, lib=library)
    torch.library.register_autograd(
        f"resode::{_name}",
        _backward if _is_forward else _refuse_second,
        setup_context=_save if _is_forward else None,
        lib=library,
    )
