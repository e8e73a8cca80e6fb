"""The depth-fused ops: a whole stack of residual perceptrons, forward or backward, as one op each.

`apply` is what modules call; `mlp_stack` the differentiable op. Schemas are in `ops/schemas.py`, what compilers and
torch.func see of the ops in `registration.py`. `reference/` is the specification of all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..adjoint.coarseness import StoredRounding
from ..adjoint.drift import DriftMonitor
from ..dtypes import dtype_name
from ..export import wants_plain
from ..method import Method
from ..ops.derivatives import is_differentiated_otherwise
from ..squares import square_dtype
from . import cuda
from .network import PARAMETERS, Network
from .reference import passes as reference
from .reference.plain import plain
from .selection import reasons_on, select
from .signature import (
    KEPT,
    SavedStates,
    StackAdjointOperands,
    StackBackend,
    StackExactAdjointOperands,
    StackOperands,
    Wanted,
    check_tensor,
    method_of,
    network_of,
)
from .storage import StoredIncrements, formats
from .triton import passes as triton

BACKENDS: dict[str, StackBackend] = {"cuda": cuda, "triton": triton, "torch": reference}


def apply(
    where: str,
    network: Network,
    method: Method,
    x: Tensor,
    gradient: str,
    backend: str,
    monitor: DriftMonitor | None = None,
) -> Tensor:
    """x_N from x_0, with the backward pass that was chosen; a monitor gets its defects.

    Raises:
        TypeError, ValueError: for operands that do not fit, or a backend that can't compute this.
        RuntimeError: for derivatives by torch.func or in forward mode, or traced ones, unless gradient is "backprop".
    """
    network = _autocast(network, x.device.type)
    state = x.to(_stream_dtype(where, network, x))
    network.check(where, method, state)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *network.parameters)
    )
    is_plain = wants_plain(where, gradient, differentiable)
    rebuilds = differentiable and gradient == "adjoint"
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    is_watched = rebuilds and monitor is not None and not (is_traced or is_plain)
    if monitor is not None and differentiable and not (is_watched or torch.compiler.is_exporting()):
        monitor.forget()
    if gradient == "backprop":
        if backend not in ("auto", "torch"):
            raise ValueError(
                f'{where}: gradient="backprop" is computed by plain torch, got backend={backend!r}; use backend="torch"'
            )
        return plain(network, method, state.contiguous()).to(x.dtype)
    if is_plain or is_differentiated_otherwise():
        if differentiable and not is_plain:
            raise RuntimeError(
                f"{where}: gradient={gradient!r} gives first derivatives in reverse mode only, got a torch.func "
                'transform or forward mode; use gradient="backprop"'
            )
        return plain(network, method, state.contiguous()).to(x.dtype)
    squares = monitor.squares(state) if is_watched and monitor is not None else None
    of_steps = None if squares is None else squares[:-1]
    # Where nothing is differentiated, nothing is kept for it.
    x_last, rounding = mlp_stack(state, network, method, "adjoint" if rebuilds else "checkpoint", backend, of_steps)
    if squares is not None and monitor is not None:
        stored = StoredRounding(method, rounding.detach()) if len(rounding) else None
        monitor.watch(x_last.grad_fn, squares, method.measures_defects, stored)
    return x_last.to(x.dtype)


def mlp_stack(
    x: Tensor, network: Network, method: Method, gradient: str, backend: str, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_N from x_0 by `torch.ops.resode.mlp_stack`, differentiable once in x and the parameters; and its `rounding`.

    Args:
        x: x_0, shape [*, dim], in the stream's dtype.
        gradient: "adjoint" rebuilds states in the backward pass, by the method's solver; "checkpoint" is exact.
        squares: shape [steps, 2], float64, for the backward pass to fill.

    Raises:
        TypeError, ValueError: as `Network.check` and `selection.select`.
    """
    of_network = *network.parameters, network.activation, network.norm
    x_last, *_, rounding = torch.ops.resode.mlp_stack(x, *of_network, *_flat(method), gradient, backend, squares)
    return x_last, rounding


def _flat(method: Method) -> tuple[Any, ...]:
    """The method as the ops take it."""
    solver = method.solver
    settings = solver.predictor, solver.corrections, solver.reuse, bool(solver.accelerate)
    bits = () if solver.bits is None else (solver.bits,) if isinstance(solver.bits, int) else solver.bits
    return method.scheme.name, method.steps, *settings, bits, solver.rounded_forward, method.anchors


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """For each op its backends, in the order for many rows, and why one can't run at all; None where it can.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    found = reasons_on(BACKENDS, torch.device("cuda" if device is None else device))
    return {f"mlp_stack{suffix}": found for suffix in ("", "_adjoint", "_exact_adjoint")}


def forward(*operands: Any) -> tuple[Tensor, ...]:
    """`mlp_stack`."""
    o = StackOperands(*operands)
    network, method = checked_stack(o)
    backend = BACKENDS[select("mlp_stack", BACKENDS, o.backend, network, method, o.x)]
    states = backend.forward(network, method, _rows(o.x))
    companions, *stored = states.stored
    increments, anchored, companions = (
        _shaped(s, (s.shape[0], *o.x.shape)) for s in (states.increments, states.anchored, companions)
    )
    assert states.x_last is not None, "a forward pass gives it"
    assert states.rounding is not None, "a forward pass gives it"
    return _shaped(states.x_last, o.x.shape), increments, anchored, companions, *stored, states.rounding


def checked_stack(operands: StackOperands) -> tuple[Network, Method]:
    """The network and the method of `mlp_stack`.

    Raises:
        TypeError, ValueError: for operands that do not fit.
    """
    if operands.gradient not in ("adjoint", "checkpoint"):
        raise ValueError(f'mlp_stack: gradient must be "adjoint" or "checkpoint", got {operands.gradient!r}')
    network, method = network_of(operands), method_of("mlp_stack", operands)
    network.check("mlp_stack", method, operands.x)
    if operands.squares is not None:
        squares = operands.squares
        check_tensor("mlp_stack", "squares", squares, (len(method), 2), square_dtype(operands.x.device), operands.x)
    return network, method


def checked_adjoint(operands: StackAdjointOperands) -> tuple[Network, Method]:
    """The network and the method of `mlp_stack_adjoint`.

    Raises:
        TypeError, ValueError: for operands that do not fit.
    """
    where, x = "mlp_stack_adjoint", operands.g if operands.x_last is None else operands.x_last
    network, method = network_of(operands), method_of(where, operands)
    network.check(where, method, x)
    if operands.x_last is None and not method.solver.is_stored:
        raise ValueError(f"{where}: x_last must be given unless increments are stored, got None; pass x_N")
    check_tensor(where, "g", operands.g, x.shape, x.dtype, x)
    check_tensor(where, "increments", operands.increments, (method.kept_increments, *x.shape), network.dtype, x)
    check_tensor(where, "anchored", operands.anchored, (method.anchor_count, *x.shape), x.dtype, x)
    for name, (shape, dtype) in formats(method, x).items():
        check_tensor(where, name, getattr(operands, name), shape, dtype, x)
    return network, method


def checked_exact_adjoint(operands: StackExactAdjointOperands) -> tuple[Network, Method]:
    """The network and the method of `mlp_stack_exact_adjoint`.

    Raises:
        TypeError, ValueError: for operands that do not fit.
    """
    where, x = "mlp_stack_exact_adjoint", operands.x
    network, method = network_of(operands), method_of(where, operands)
    network.check(where, method, x)
    check_tensor(where, "g", operands.g, x.shape, x.dtype, x)
    return network, method


def adjoint(*operands: Any) -> tuple[Tensor, ...]:
    """`mlp_stack_adjoint`."""
    o = StackAdjointOperands(*operands)
    network, method = checked_adjoint(o)
    backend = BACKENDS[select("mlp_stack_adjoint", BACKENDS, o.backend, network, method, o.g)]
    sample_rows = max(1, math.prod(o.g.shape[1:-1]))
    increments, anchored, companions = map(_stacked_rows, (o.increments, o.anchored, o.companions))
    stored = StoredIncrements(companions, o.units.contiguous(), o.scales.contiguous(), o.packed.contiguous())
    x_last = None if o.x_last is None else _rows(o.x_last)
    states = SavedStates(x_last, increments, anchored, stored, sample_rows=sample_rows)
    found = backend.adjoint(network, method, _rows(o.g), states, Wanted(o.wants_parameters, o.wants_input))
    x_first = o.g.new_empty(0) if found.x is None else _shaped(found.x, o.g.shape)
    return _shaped(found.g, o.g.shape), *_filled(found.gradients, network, o.g), found.squares, x_first


def exact_adjoint(*operands: Any) -> tuple[Tensor, ...]:
    """`mlp_stack_exact_adjoint`."""
    o = StackExactAdjointOperands(*operands)
    network, method = checked_exact_adjoint(o)
    backend = BACKENDS[select("mlp_stack_exact_adjoint", BACKENDS, o.backend, network, method, o.g)]
    g_first, gradients = backend.exact_adjoint(network, method, _rows(o.g), _rows(o.x), o.wants_parameters)
    return _shaped(g_first, o.g.shape), *_filled(gradients, network, o.g)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o = StackOperands(*inputs)
    x_last, *kept, _ = output
    # With stored increments the way back starts where companions end.
    states = (o.x,) if o.gradient == "checkpoint" else (None if o.predictor == "stored" else x_last, *kept)
    ctx.save_for_backward(o.weight_in, o.bias_in, o.weight_out, o.bias_out, *states)
    ctx.set_materialize_grads(False)
    ctx.squares = o.squares
    ctx.kinds = _kinds(o.weight_in, o.bias_in, o.weight_out, o.bias_out)
    # Autograd alone is to hold the tensors.
    without_tensors: dict[str, Any] = dict.fromkeys(("x", *PARAMETERS, "squares"))
    ctx.operands = o._replace(**without_tensors)


def backward(ctx: Any, g: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None and other.numel() for other in others):
        raise RuntimeError("mlp_stack: only x_last has a gradient, got one for another result; leave these alone")
    if g is None:
        return (None,) * len(StackOperands._fields)
    saved = _saved_tensors(ctx)
    parameters, states = dict(zip(PARAMETERS, saved[:4], strict=True)), saved[4:]
    o: StackOperands = ctx.operands._replace(**parameters)
    needs = StackOperands(*ctx.needs_input_grad)
    wants_parameters = any(getattr(needs, name) for name in PARAMETERS)
    if o.gradient == "checkpoint":
        exact = StackExactAdjointOperands(
            g=g, x=states[0], wants_parameters=wants_parameters, **_shared(o, StackExactAdjointOperands)
        )
        g_first, *gradients = torch.ops.resode.mlp_stack_exact_adjoint(*exact)
    else:
        rebuilding = StackAdjointOperands(
            g=g,
            **dict(zip(KEPT, states, strict=True)),
            wants_parameters=wants_parameters,
            wants_input=False,
            **_shared(o, StackAdjointOperands),
        )
        g_first, *gradients, squares, _ = torch.ops.resode.mlp_stack_adjoint(*rebuilding)
        if ctx.squares is not None and not is_legacy_batchedtensor(squares):
            ctx.squares.copy_(squares.detach())
    found = {"x": g_first, **dict(zip(PARAMETERS, gradients, strict=True))}
    return tuple(found.get(name) if getattr(needs, name) else None for name in StackOperands._fields)


def _saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What `save_for_backward` saved, as it was then."""
    what = "x" if ctx.operands.gradient == "checkpoint" else "the output"
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors  # once: a checkpoint unpacks them once alone
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"mlp_stack: between forward and backward neither {what} nor a parameter may be modified in place, but one "
            "was; use y = y + z instead of y += z, and step the optimizer after backward"
        ) from error
    if (kinds := _kinds(*saved[:4])) != ctx.kinds:
        before, now = (sorted({f"{dtype_name(dtype)} on {device}" for dtype, device in k}) for k in (ctx.kinds, kinds))
        raise RuntimeError(
            "mlp_stack: between forward and backward parameters must keep dtype and device, got "
            f"{', '.join(before)} -> {', '.join(now)}; convert the module before forward or after backward"
        )
    return saved


def _kinds(*parameters: Tensor | None) -> list[tuple[torch.dtype, torch.device]]:
    return [(parameter.dtype, parameter.device) for parameter in parameters if parameter is not None]


def _shared(o: StackOperands, wanted: type[StackAdjointOperands | StackExactAdjointOperands]) -> dict[str, Any]:
    """The operands of the forward op that a backward op has under the same name, x aside."""
    return {name: getattr(o, name) for name in o._fields if name in wanted._fields and name != "x"}


def refuse_second(ctx: Any, *cotangents: Any) -> Any:
    raise RuntimeError(
        "mlp_stack: gradients are of first order in reverse mode, got a double backward (create_graph=True); use "
        'gradient="backprop"'
    )


def _shaped(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The result of that shape, in the memory of rows. A view would be one that autograd lets nobody write in."""
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return shaped


def _rows(states: Tensor) -> Tensor:
    """[rows, dim], contiguous."""
    return states.reshape(states.numel() // states.shape[-1], states.shape[-1]).contiguous()


def _stacked_rows(states: Tensor) -> Tensor:
    """[states, rows, dim], contiguous."""
    count, dim = states.shape[0], states.shape[-1]
    return states.reshape(count, math.prod(states.shape[1:-1]), dim).contiguous()


def _filled(gradients: Sequence[Tensor | None] | None, network: Network, g: Tensor) -> list[Tensor]:
    """The gradients in the parameters' dtype; empty where there is none."""
    if gradients is None:
        gradients = (None,) * len(PARAMETERS)
    empty = [g.new_empty(0, dtype=network.dtype) for _ in PARAMETERS]
    return [e if gradient is None else gradient.to(network.dtype) for gradient, e in zip(gradients, empty, strict=True)]


def _autocast(network: Network, device_type: str) -> Network:
    """The network with its parameters in autocast's dtype, where that is on."""
    if not _autocasts(network, device_type):
        return network
    dtype = torch.get_autocast_dtype(device_type)
    cast = (None if parameter is None else parameter.to(dtype) for parameter in network.parameters)
    return replace(network, **dict(zip(PARAMETERS, cast, strict=True)))  # type: ignore[arg-type]


def _autocasts(network: Network, device_type: str) -> bool:
    """Autocast leaves float64 alone, and what is not floating is an error."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return False
    return all(p is None or p.is_floating_point() for p in network.parameters) and network.dtype != torch.float64


def _stream_dtype(where: str, network: Network, x: Tensor) -> torch.dtype:
    """The network's stream dtype, for an x of that dtype, the parameters', or under autocast any of 16 bits."""
    known = {network.dtype, network.stream_dtype}
    if _autocasts(network, x.device.type):
        known |= {torch.bfloat16, torch.float16}
    if x.dtype not in known:
        raise TypeError(
            f"{where}: x must have the parameters' dtype, {dtype_name(network.dtype)}, got {dtype_name(x.dtype)}; "
            "convert x or the parameters, or use torch.autocast"
        )
    return network.stream_dtype
