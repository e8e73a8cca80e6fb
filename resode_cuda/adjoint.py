"""The discrete adjoint: a backward pass that rebuilds the states instead of storing them.

Every step is one autograd node, and nothing is hidden between nodes: what the backward pass knows of the trajectory
(the rebuilt state and, to extrapolate, two increments) travels from node to node as the cotangents of shadow outputs,
tensors of the state's shape without storage of their own. Only the last step saves anything, x_N and the last two
increments, and steps with an anchor, which save the state they start from. So the order of execution is autograd's
own, a second backward pass starts afresh from x_N, and each parameter's gradient leaves as soon as its step is done.

Discrete adjoint method: Sander, Ablin and Peyré, NeurIPS 2022, arXiv:2205.14612.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Arguments, Block, BlockCall, HeldParameter, held_parameters, modified_in_place
from .drift import DriftMonitor
from .replay import swapped
from .reverse import Reverse, extrapolate, extrapolation_weights, predict
from .schemes import BlockFunction, Scheme


def propagate(
    scheme: type[Scheme],
    solver: Reverse,
    blocks: Sequence[Block],
    steps: Sequence[float],
    anchors: int | None,
    x: Tensor,
    arguments: Arguments,
    argument_tensors: Sequence[Tensor],
    monitor: DriftMonitor,
    keep_input: bool = False,
) -> Tensor:
    """x_N from x_0, recorded so that the backward pass rebuilds the states.

    Args:
        steps: h of each step.
        anchors: keep the exact state at every step n divisible by it; None keeps x_N alone.
        keep_input: keep x_0, and measure how far the rebuilt one is from it.
    """
    blank = x.new_zeros(())
    shadows: Sequence[Tensor | None] = (None,) * (3 if solver.extrapolates else 1)
    increments: list[Tensor] = []
    last = len(steps) - 1
    for n, h in enumerate(steps):
        used = blocks[n : n + scheme.blocks_per_step]
        parameters = held_parameters(used)
        step = Step(
            n=n,
            steps_after=last - n,
            is_anchored=anchors is not None and n % anchors == 0,
            is_input_kept=keep_input and n == 0,
            is_result_saved=n == last or (anchors is not None and (n + 1) % anchors == 0),
            scheme=scheme,
            solver=solver,
            h=h,
            weights=extrapolation_weights(scheme, steps, n - 1) if solver.extrapolates and 0 < n < last else None,
            calls=[BlockCall(block, x.device) for block in used],
            parameters=parameters,
            arguments=arguments,
            monitor=monitor,
            blank=blank,
        )
        tensors = *argument_tensors, *(parameter.tensor for parameter in parameters)
        x, *shadows = AdjointStep.apply(step, increments, x, *shadows, *tensors)
    return x


def unsupported(what: str) -> RuntimeError:
    return RuntimeError(
        f'ResidualStack: gradient="adjoint" gives first derivatives in reverse mode only, got {what}; '
        'use gradient="backprop"'
    )


@dataclass
class Step:
    """What step n needs beside tensors of the state's size, forwards and backwards."""

    n: int
    steps_after: int
    is_anchored: bool
    is_input_kept: bool
    is_result_saved: bool
    """By this step or, as its anchor, by the next one: a rebuilt x_{n+1} is then that tensor."""
    scheme: type[Scheme]
    solver: Reverse
    h: float
    weights: tuple[float, float] | None
    """With which step n - 1 is extrapolated from this step's increment and the next one's."""
    calls: list[BlockCall]
    parameters: list[HeldParameter]
    arguments: Arguments
    monitor: DriftMonitor
    blank: Tensor
    """One element, the storage of all shadows."""

    @property
    def is_last(self) -> bool:
        return self.steps_after == 0

    @property
    def is_increment_saved(self) -> bool:
        """By the last step: what arrives here as the expected increment is then that tensor."""
        return self.solver.extrapolates and self.steps_after < 2

    @property
    def shadow_count(self) -> int:
        return 3 if self.solver.extrapolates else 1

    def functions(self, argument_tensors: Sequence[Tensor]) -> list[BlockFunction]:
        """The step's blocks as functions of the state alone."""
        call = self.arguments.filled(argument_tensors)
        return [block_call.function(call) for block_call in self.calls]


class AdjointStep(torch.autograd.Function):
    """x_{n+1} = x_n + Phi_n(x_n), and backwards g_n = g_{n+1} + (dPhi_n/dx)^T g_{n+1} at the rebuilt x_n.

    Inputs: the step, the list of the latest increments, x_n, the shadows (None for the first step), the tensors among
    the blocks' arguments, the blocks' parameters. Outputs: x_{n+1} and the shadows, of which the last step has none.

    Cotangents of the shadows: the rebuilt x_{n+1}; with extrapolation also the increment expected of step n and the
    increment d_{n+1} (for step N - 2 the two are exact, from the forward pass).
    """

    @staticmethod
    def forward(ctx: Any, step: Step, increments: list[Tensor], x: Tensor, *shadows_and_tensors: Any) -> Any:
        tensors = shadows_and_tensors[step.shadow_count :]
        phi = step.scheme.increment(step.functions(tensors[: step.arguments.count]), x, step.h)
        if step.is_increment_saved:
            increments.insert(0, phi)
        in_place = not step.is_increment_saved and phi.stride() == x.stride()
        x_next = phi.add_(x) if in_place else x + phi
        end = [x_next, *increments] if step.is_last else []
        start = [x] if step.is_anchored or step.is_input_kept else []
        ctx.save_for_backward(*tensors, *end, *start)
        ctx.set_materialize_grads(False)
        ctx.step = step
        if step.is_last:
            return (x_next,)
        return x_next, *(step.blank.expand(x.shape) for _ in range(step.shadow_count))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *cotangents: Tensor | None) -> Any:
        step: Step = ctx.step
        needs_x, needs_state = ctx.needs_input_grad[2:4]
        needs_tensors = ctx.needs_input_grad[3 + step.shadow_count :]
        if torch.is_grad_enabled():
            raise unsupported("a double backward (create_graph=True)")
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, end, start = _saved_tensors(ctx, len(needs_tensors))
        anchor = start if step.is_anchored else None
        if step.is_last:
            step.monitor.begin(g, measures=step.solver.reuse)
        x_next, expected, d_next = _known(end if step.is_last else cotangents, g)

        with _leaves(step, tensors, needs_tensors) as leaves:
            functions = step.functions(leaves[: step.arguments.count])
            y = anchor
            if y is None:
                spare = None if step.is_increment_saved else expected
                y = predict(step.solver, step.scheme, functions, x_next, step.h, expected, spare)
            y = y.detach().requires_grad_(needs_x)
            phi, g_y, g_tensors = _increment_and_vjp(step, functions, y, leaves, g)

        y = y.detach()
        if step.is_input_kept and start is not None:
            step.monitor.record_input(x_next - phi if step.solver.reuse or step.is_anchored else y, start)
        # What travels is nobody else's and may be overwritten; what is saved may not.
        x = y
        if step.solver.reuse and anchor is None:
            x = torch.sub(x_next, phi, out=None if step.is_result_saved else x_next)
        if anchor is None:
            step.monitor.record(step.n, y, x)
        shadows: list[Tensor | None] = [None] * step.shadow_count
        if needs_state:
            shadows[0] = x
            if step.solver.extrapolates:
                spare = None if anchor is not None else y
                # The last step has the increment before its own from the forward pass.
                shadows[1] = d_next if step.weights is None else extrapolate(step.weights, phi, d_next, spare)  # type: ignore[arg-type]
                shadows[2] = phi
        else:
            step.monitor.end()
        g_x = g if g_y is None else g + g_y
        return None, None, g_x if needs_x else None, *shadows, *g_tensors

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise unsupported("forward-mode differentiation")


def _saved_tensors(ctx: Any, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """The step's tensors, what the last step keeps (x_N and increments, newest first), and the state it starts from."""
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise modified_in_place() from error
    tensors, kept = saved[:count], saved[count:]
    keeps_start = ctx.step.is_anchored or ctx.step.is_input_kept
    return (tensors, kept[:-1], kept[-1]) if keeps_start else (tensors, kept, None)


def _known(tensors: Sequence[Tensor | None], g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x_{n+1}, the increment expected of step n and d_{n+1}; the last two None where there are none."""
    x_next, expected, d_next = (*tensors, None, None)[:3]
    if x_next is None or x_next.shape != g.shape or x_next.dtype != g.dtype:
        raise RuntimeError(
            "ResidualStack: the rebuilt state must reach every step as a cotangent of the state's shape and dtype, got "
            f"{None if x_next is None else (list(x_next.shape), x_next.dtype)}; run autograd over the whole stack, and "
            "report this if you did"
        )
    return x_next, expected, d_next


@contextmanager
def _leaves(step: Step, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Iterator[Sequence[Tensor]]:
    """Leaves to differentiate for: the arguments' tensors, cut off from their graph, and the parameters, which the
    blocks hold meanwhile.

    The blocks' own parameters serve where they are still those of the forward pass. They do not after
    torch.func.functional_call or under saved-tensor hooks; and hooks on a parameter must fire once, when its whole
    gradient is known, not here.
    """
    count = step.arguments.count
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    parameters = tensors[count:]
    places = [held.slots for held in step.parameters]
    if all(
        all(slot.get() is parameter for slot in slots)
        and parameter.requires_grad == need
        and not parameter._backward_hooks
        for slots, parameter, need in zip(places, parameters, needs[count:], strict=True)
    ):
        yield (*leaves[:count], *parameters)
    else:
        pairs = [(slot, leaf) for slots, leaf in zip(places, leaves[count:], strict=True) for slot in slots]
        with swapped([slot for slot, _ in pairs], [leaf for _, leaf in pairs]):
            yield leaves


def _increment_and_vjp(
    step: Step, functions: Sequence[BlockFunction], y: Tensor, leaves: Sequence[Tensor], g: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Phi_n(y), and its vector-Jacobian products with g for y and the leaves; None where there is none."""
    with torch.enable_grad():
        phi = step.scheme.increment(functions, y, step.h)
    wanted = [tensor for tensor in (y, *leaves) if tensor.requires_grad]
    products: dict[int, Tensor | None] = {}
    if phi.requires_grad:
        _check_all_found(step.n, phi, wanted)
        try:
            products = dict(zip(map(id, wanted), torch.autograd.grad(phi, wanted, g, allow_unused=True), strict=True))
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"ResidualStack: the blocks of step {step.n} must not use reentrant checkpointing with "
                'gradient="adjoint"; pass use_reentrant=False to torch.utils.checkpoint'
            ) from error
    return phi.detach(), products.get(id(y)), [products.get(id(leaf)) for leaf in leaves]


def _check_all_found(n: int, phi: Tensor, wanted: Sequence[Tensor]) -> None:
    """Raise if phi depends on a tensor that needs gradients and is not among those wanted."""
    known = set(map(id, wanted))
    seen: set[Any] = set()
    pending: list[Any] = [phi.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in known:
            raise RuntimeError(
                f"ResidualStack: the blocks of step {n} use a tensor of shape {list(node.variable.shape)} that needs "
                "gradients and is neither their parameter nor an argument of the stack; register it as nn.Parameter, "
                "pass it to the stack, or detach it"
            )
