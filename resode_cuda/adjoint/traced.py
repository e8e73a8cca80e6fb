"""The stack as torch.compile can trace it whole: `adjoint` and `checkpoint` without what a trace cannot hold.

Blocks are called as functions of their parameters, and everything is out of place: the compiler fuses it with what the
blocks do, and decides about memory itself. Nothing is replayed and no drift is measured, so blocks must be functions of
their arguments alone; `is_traceable` looks for what is known not to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..method import Method
from ..schemes import BlockFunction, Vjp
from ..schemes import step as take_step
from .block_arguments import Call
from .blocks import Block
from .step import Step, backward_update, shadow_count
from .stored_step import known_states, stored_forward


def is_traceable(modules: Iterable[nn.Module]) -> bool:
    """Whether no module is known to draw random numbers, to write its buffers or to call hooks."""
    return not any(_is_changing(module) or module._forward_hooks or module._forward_pre_hooks for module in modules)


def are_known(modules: Iterable[nn.Module]) -> bool:
    """Whether all modules are torch's own or this library's, of which it is known what they draw and write."""
    return all(type(module).__module__.startswith(("torch.nn.", "resode_cuda.")) for module in modules)


def _is_changing(module: nn.Module) -> bool:
    if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)):
        # In eval mode torch computes them otherwise where no gradient is asked for.
        dropout = getattr(module, "dropout", 0)  # a number in nn.MultiheadAttention, a module in others
        return not module.training or getattr(dropout, "p", dropout) != 0
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return module.track_running_stats
    return isinstance(module, (nn.RReLU, _SpectralNorm))


def propagate(method: Method, blocks: Sequence[Block], x: Tensor, arguments: TracedArguments) -> Tensor:
    """x_N from x_0 with the backward pass of `node.propagate`."""
    blank = x.new_zeros(())
    shadows: Sequence[Tensor | None] = (None,) * shadow_count(method)
    for n in range(len(method)):
        used = blocks[method.blocks_of(n)]
        names = [[name for name, _ in block.module.named_parameters()] for block in used]
        parameters = [parameter for block in used for _, parameter in block.module.named_parameters()]
        evaluation = TracedEvaluation(used, names, arguments)
        x, *shadows = TracedStep.apply(Step(method, n), evaluation, blank, x, *shadows, *arguments.tensors, *parameters)
    return x


def propagate_checkpointed(method: Method, blocks: Sequence[Block], x: Tensor, call: Call) -> Tensor:
    """x_N from x_0 with the backward pass of `checkpoint.propagate`."""
    for n, h in enumerate(method.steps):
        functions = [block.function(call, []) for block in blocks[method.blocks_of(n)]]

        def step(x: Tensor, functions: list[BlockFunction] = functions, h: float = h) -> Tensor:
            return take_step(method.scheme, functions, x, h)[0]

        x = checkpoint(step, x, use_reentrant=False)
    return x


class TracedArguments:
    """`arguments.Arguments` without identities of tensors, which a compiler can't trace; the same for every block."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[place] for place in self._places]
        self.count = len(self._places)

    def filled(self, tensors: Sequence[Tensor]) -> Call:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return Call(*pytree.tree_unflatten(leaves, self._spec))

    def check(self, block: Block, call: Call) -> None:
        """Raise if the block has changed the containers of its call, which no other block sees."""
        if len(pytree.tree_leaves(tuple(call))) != len(self._leaves):
            raise RuntimeError(
                f"{block.where} must not change a container among its arguments in compiled code; call the stack "
                "through torch.compiler.disable"
            )


class TracedEvaluation:
    """A step's blocks, as functions of the state and of the tensors that they use: those among the arguments, then each
    block's parameters."""

    def __init__(self, blocks: Sequence[Block], names: Sequence[Sequence[str]], arguments: TracedArguments) -> None:
        self.blocks, self.names, self.arguments = blocks, names, arguments

    def functions(self, tensors: Sequence[Tensor]) -> list[Function]:
        found, begin = [], self.arguments.count
        for block, names in zip(self.blocks, self.names, strict=True):
            places = [*range(self.arguments.count), *range(begin, begin + len(names))]
            found.append(Function(block, names, self.arguments, places, tensors))
            begin += len(names)
        return found


class Function:
    """A block as a function of the state; `of` also of its tensors, which stand at `places` among the step's."""

    def __init__(
        self,
        block: Block,
        names: Sequence[str],
        arguments: TracedArguments,
        places: Sequence[int],
        tensors: Sequence[Tensor],
    ) -> None:
        self.block, self.names, self.arguments, self.places = block, names, arguments, places
        self.tensors = [tensors[place] for place in places]

    def __call__(self, x: Tensor) -> Tensor:
        return self.of(x, self.tensors)

    def of(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        count = self.arguments.count
        parameters = dict(zip(self.names, tensors[count:], strict=True))
        call = self.arguments.filled(tensors[:count])
        out = self.block(x, call, [], parameters)
        self.arguments.check(self.block, call)
        return out


class TracedVjps:
    """`vjp.BlockVjps`, by torch.func.vjp."""

    def __init__(self, wants: Sequence[bool]) -> None:
        self.wants = wants
        self.found: list[Tensor | None] = [None] * len(wants)

    def linearize(self, f: Any, x: Tensor) -> tuple[Tensor, Vjp]:
        varied = [i for i, place in enumerate(f.places) if self.wants[place]]

        def of_what_varies(x: Tensor, *some: Tensor) -> Tensor:
            tensors = list(f.tensors)
            for i, tensor in zip(varied, some, strict=True):
                tensors[i] = tensor
            return f.of(x, tensors)

        out, vjp_of_all = torch.func.vjp(of_what_varies, x, *[f.tensors[i] for i in varied])[:2]

        def vjp(cotangent: Tensor) -> Tensor:
            products: tuple[Tensor, ...] = vjp_of_all(cotangent.to(out.dtype))
            for i, product in zip(varied, products[1:], strict=True):
                place = f.places[i]
                before = self.found[place]
                self.found[place] = product if before is None else before + product
            return products[0]

        return out, vjp


class TracedStep(torch.autograd.Function):
    """`node.AdjointStep`, with one blank element more among the inputs."""

    @staticmethod
    def forward(ctx: Any, step: Step, evaluation: TracedEvaluation, blank: Tensor, x: Tensor, *rest: Any) -> Any:
        shadows, tensors = rest[: step.shadow_count], rest[step.shadow_count :]
        functions = evaluation.functions(tensors)
        if step.method.solver.is_stored:
            forward = stored_forward(step, functions, x, shadows, blank)
            x_next, kept, new_shadows = forward.x_next, forward.kept, forward.shadows
        else:
            x_next, stages = take_step(step.scheme, functions, x, step.h)
            kept = tuple(step.saved_for_last(x_next, stages, shadows))
            new_shadows = tuple(step.shadows(x, stages, blank))
        start = [x] if step.is_anchored else []
        ctx.save_for_backward(*tensors, *kept, *start)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.evaluation = step, evaluation
        return x_next, *new_shadows

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *cotangents: Tensor | None) -> Any:
        step: Step = ctx.step
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_x, needs_state = ctx.needs_input_grad[3:5]
        wants = ctx.needs_input_grad[4 + step.shadow_count :]
        tensors, kept = ctx.saved_tensors[: len(wants)], ctx.saved_tensors[len(wants) :]
        kept, anchor = (kept[:-1], kept[-1]) if step.is_anchored else (kept, None)
        gamma = step.scheme.weight(step.h) * g if step.is_last else g
        functions = ctx.evaluation.functions(tensors)
        trajectory, y = known_states(step, kept, anchor, cotangents, g, None)
        if y is None:
            y = step.predict(functions, trajectory)
        vjps = TracedVjps(wants)
        evaluated = step.scheme.vjp(functions, y.to(g.dtype), step.h, gamma, vjps.linearize)
        weights = step.weights_before if needs_state else None
        update = backward_update(step, trajectory, y, evaluated, gamma if needs_x else None, weights)
        shadow_cotangents = update.cotangents if needs_state else ()
        missing = (None,) * (step.shadow_count - len(shadow_cotangents))
        return None, None, None, update.gamma, *shadow_cotangents, *missing, *vjps.found
