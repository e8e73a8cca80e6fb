"""Registers the depth-fused ops: what compilers, torch.func and autograd see of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.derivatives import register_derivatives
from ..ops.schemas import MLP_STACK, MLP_STACK_ADJOINT, MLP_STACK_EXACT_ADJOINT
from ..squares import square_dtype
from . import op
from .network import PARAMETERS, Network
from .signature import StackAdjointOperands, StackExactAdjointOperands, StackOperands, method_of
from .storage import StoredIncrements, rounding_shape, unfilled

library = torch.library.Library("resode", "FRAGMENT")


def forward_fake(*operands: Any) -> tuple[Tensor, ...]:
    o = StackOperands(*operands)
    network, method = op.checked_stack(o)
    increments = o.x.new_empty((method.kept_increments, *o.x.shape), dtype=network.dtype)
    anchored = o.x.new_empty((method.anchor_count, *o.x.shape))
    rounding = o.x.new_empty(rounding_shape(method), dtype=square_dtype(o.x.device))
    return o.x.new_empty(o.x.shape), increments, anchored, *unfilled(method, o.x), rounding


def adjoint_fake(*operands: Any) -> tuple[Tensor, ...]:
    o = StackAdjointOperands(*operands)
    network, method = op.checked_adjoint(o)
    squares = o.g.new_empty(len(method), 2, dtype=square_dtype(o.g.device))
    x_first = o.g.new_empty(o.g.shape if o.wants_input else 0)
    return o.g.new_empty(o.g.shape), *_gradients_fake(network, o.g, o.wants_parameters), squares, x_first


def exact_adjoint_fake(*operands: Any) -> tuple[Tensor, ...]:
    o = StackExactAdjointOperands(*operands)
    network, _ = op.checked_exact_adjoint(o)
    return o.g.new_empty(o.g.shape), *_gradients_fake(network, o.g, o.wants_parameters)


def _gradients_fake(network: Network, g: Tensor, wants_parameters: bool) -> list[Tensor]:
    return [
        g.new_empty(0 if parameter is None or not wants_parameters else parameter.shape, dtype=network.dtype)
        for parameter in network.parameters
    ]


def forward_vmap(info: Any, dims: tuple[Any, ...], *operands: Any) -> Any:
    batched, o = StackOperands(*dims), StackOperands(*operands)
    # Of a list such as steps, its dims are a list.
    if any(getattr(batched, name) is not None for name in (*PARAMETERS, "squares")):
        raise NotImplementedError(
            'mlp_stack: torch.vmap must batch x alone, got batched parameters; use gradient="backprop"'
        )
    x = o.x.movedim(batched.x or 0, 0)  # type: ignore[arg-type]
    # Samples stay what they are for each of the batch: its dimension may not become that of the samples.
    outputs = torch.ops.resode.mlp_stack(*o._replace(x=x if x.dim() < 3 else x.flatten(0, 1)))
    x_last, increments, anchored, companions, units, scales, packed, rounding = outputs
    states = (*(state.view(len(state), *x.shape) for state in (increments, anchored, companions)),)
    of_rows = (*(each.unflatten(1, (len(x), -1)) for each in (units, scales)),)
    steps = StoredIncrements(companions, units, scales, packed).steps(method_of("mlp_stack", o))
    packed = torch.cat([packed.new_empty(len(x), 0), *(step.reshape(len(x), -1) for step in steps)], 1)
    # What was rounded off is summed over the batch.
    return (x_last.view(x.shape), *states, *of_rows, packed, rounding), (0, 1, 1, 1, 1, 1, 0, None)


def refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        'mlp_stack: torch.vmap must not reach its backward pass, whose gradients are sums; use gradient="backprop"'
    )


def _without_autocast(implementation: Any) -> Any:
    """The implementation, computing in its operands' dtypes where a backward pass meets an autocast of its own."""

    def implementation_as_is(*operands: Any) -> Any:
        device_type = operands[0].device.type
        if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
            return implementation(*operands)
        with torch.autocast(device_type, enabled=False):
            return implementation(*operands)

    return implementation_as_is


def _register(schema: str, implementation: Any, fake: Any, vmap: Any) -> str:
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"resode::{name}", fake, lib=library)
    torch.library.register_vmap(f"resode::{name}", vmap, lib=library)
    return name


WAY_OUT = 'use gradient="backprop" of a ResidualMLP or of residual_mlp'

_name = _register(MLP_STACK, op.forward, forward_fake, forward_vmap)
register_derivatives(library, _name, op.backward, op.save_for_backward, way_out=WAY_OUT)
for _name in (
    _register(MLP_STACK_ADJOINT, op.adjoint, adjoint_fake, refuse_vmap),
    _register(MLP_STACK_EXACT_ADJOINT, op.exact_adjoint, exact_adjoint_fake, refuse_vmap),
):
    register_derivatives(library, _name, op.refuse_second, way_out=WAY_OUT)
