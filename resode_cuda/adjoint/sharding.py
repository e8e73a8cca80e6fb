"""Blocks whose parameters torch's `fully_shard` (FSDP2) gathers while they run and frees afterwards.

In ordinary training hooks around a block see to its backward pass: one on its output gathers the parameters, one on its
input reduces and scatters the gradients that autograd left on them. A step of the adjoint runs its blocks inside a node
of its own, where these hooks are not. So it does what they do, when they would: `gather` before it evaluates anything,
`reduce` when it has the gradients. Modules that run in between find the state that FSDP gives to recomputed blocks:
they cast as the policy says, and leave the parameters alone. The collectives, their order and the prefetching are those
of FSDP with checkpointing.

torch has no public names for these hooks. All that is used of its own ones is in this file; it was tried with torch
2.13, and torch releases that lack one of them are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .restoration import undo_later

T = TypeVar("T")
TRAINED, FROZEN = torch.empty(0, requires_grad=True), torch.empty(0)
"""What a node gets in the place of a sharded parameter, so that it has a backward pass if the parameter is trained.
Given the parameter itself, autograd would call its hooks, which FSDP calls when it has reduced the gradient."""


def is_sharded_by_wrapping(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules is FSDP1's, which flattens the parameters into one."""
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(isinstance(module, wrapper) for module in modules)


class Shards:
    """What FSDP holds of a block's parameters.

    Args:
        modules: the block and all modules inside it.

    Attributes:
        states: FSDP's of these modules, each once.

    Raises:
        RuntimeError: if this torch release has other names for what is needed.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        sharded = [module for module in modules if isinstance(module, fsdp)]
        self._by_place: dict[tuple[int, str], Any] = {}
        try:
            self.states = list(dict.fromkeys(module._get_fsdp_state() for module in sharded))
            for state in self.states:
                for group in _groups(state):
                    for parameter in group.fsdp_params:
                        self._by_place.update(dict.fromkeys(_places(parameter), parameter))
                    _ = group.post_backward, group.is_unsharded
                _ = state._pre_forward, state._post_forward, state._pre_backward, state._training_state.PRE_BACKWARD
                if state._mp_policy.param_dtype or state._mp_policy.output_dtype:
                    # Releases without it do not cast what recomputed modules get and return.
                    _ = state._cast_forward_inputs
        except AttributeError as error:
            raise RuntimeError(
                f"ResidualStack: blocks that are sharded one by one need parts of fully_shard that torch "
                f"{torch.__version__} does not have ({error}); shard the stack or the whole model, or use "
                'gradient="backprop"'
            ) from error

    def __bool__(self) -> bool:
        return bool(self.states)

    def of(self, module: nn.Module, name: str) -> Any:
        """FSDP's record of a module's parameter; None for one that is not sharded here."""
        return self._by_place.get((id(module), name))

    def own(self, hook: Any) -> bool:
        """Whether a hook is FSDP's, which does nothing in a gathered block."""
        return getattr(hook, "__self__", None) in self.states


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _places(parameter: Any) -> list[tuple[int, str]]:
    """The modules that have the parameter, by their identity, and its names in them."""
    info = parameter._module_info
    modules, names = (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names)
    return list(zip(map(id, modules), names, strict=True))


def sharded(parameter: Any) -> Tensor:
    """This rank's part of a parameter, which is what the optimizer sees."""
    return parameter.sharded_param


def whole(parameter: Any) -> Tensor:
    """A parameter as its block sees it while it is gathered."""
    return parameter.unsharded_param


def stand_in(part: Tensor) -> Tensor:
    """What a node gets in the place of a sharded parameter."""
    return TRAINED if part.requires_grad else FROZEN


def are_gradients_left() -> bool:
    """Whether the backward pass that is under way leaves gradients on parameters: not one for some inputs alone."""
    return torch._C._will_engine_execute_node(get_gradient_edge(TRAINED).node)


def states_of(shards: Sequence[Shards]) -> list[Any]:
    """FSDP's states of several blocks, each once, in the order in which a backward pass comes by them."""
    return list(dict.fromkeys(state for of_block in reversed(shards) for state in of_block.states))


def passed_on(x: Tensor) -> tuple[Any, int] | None:
    """The node of autograd's graph, and its output, that FSDP has passed on to a module as x; None for any other x."""
    node, place, source = x.grad_fn, x.output_nr, None
    while node is not None and type(node).__name__ == "RegisterPostBackwardFunctionBackward":  # one a group
        source = node, place = node.next_functions[place]
    return source


def while_gathered(states: Sequence[Any], run: Callable[[], T]) -> T:
    """run() in the forward pass, with all parameters in their places. FSDP's hooks only cast meanwhile.

    What else they do they would put into a graph that is kept, and do again in the step's backward pass through it.
    """
    if not states:
        return run()
    try:
        with torch.no_grad():
            for state in states:
                state._pre_forward(None, (), {})
        for state in states:
            state._training_state = state._training_state.PRE_BACKWARD
        out = run()
    finally:
        for state in states:
            state._training_state = state._training_state.FORWARD
    with torch.no_grad():
        for state in reversed(states):
            state._post_forward(None, None, None)
    return out


def gather(states: Sequence[Any], g: Tensor) -> None:
    """Have all parameters in their places, as FSDP does before the backward pass of their blocks.

    Args:
        g: gradient of the blocks' output.
    """
    for state in states:
        state._pre_backward(g)
        if not all(group.is_unsharded for group in _groups(state)):
            raise RuntimeError(
                "ResidualStack: blocks run again in the backward pass and need their parameters there, got "
                "set_unshard_in_backward(False); leave it out for modules inside the stack"
            )


def gathered(parameter: Any, needs: bool) -> Tensor:
    """A parameter that is in its place, to differentiate for.

    Args:
        needs: whether it has a gradient, until the `restoring` around this ends.
    """
    tensor = whole(parameter)
    if tensor.requires_grad != needs:
        undo_later(tensor.requires_grad_, tensor.requires_grad)
        tensor.requires_grad_(needs)
    return tensor


def leave_gradient(parameter: Any, gradient: Tensor | None) -> None:
    """Leave a gradient where autograd leaves it for FSDP, unless the parameter was frozen meanwhile."""
    if gradient is not None and sharded(parameter).requires_grad:
        tensor = whole(parameter)
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def reduce(states: Sequence[Any], postponed: Collection[Any]) -> None:
    """Reduce and scatter the gradients, and free the parameters, as FSDP does after the blocks' backward pass.

    Args:
        postponed: those of modules that a step before uses too, which will do it, with the gradients of both.
    """
    for state in reversed(states):
        for group in reversed(_groups(state)):
            if state not in postponed:
                group.post_backward()
                continue
            reduces, group.reduce_grads = group.reduce_grads, False
            try:
                group.post_backward()
            finally:
                group.reduce_grads = reduces
            # Else the end of the pass would not look at it, should the step before never come.
            group._training_state = group._training_state.IDLE
