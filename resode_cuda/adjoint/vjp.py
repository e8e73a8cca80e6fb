"""The vector-Jacobian products of a step's blocks, and the leaves that they are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..schemes import BlockFunction, Vjp
from .block_arguments import Kind
from .blocks import Auxiliaries
from .inventory import HeldParameter
from .restoration import put
from .sharding import gathered


def argument_leaves(
    tensors: Sequence[Tensor], kinds: Sequence[Kind], needs: Sequence[bool], parameters: dict[int, Tensor]
) -> list[Tensor]:
    """Leaves to differentiate for in the place of a stack's argument tensors.

    A tensor that has no gradient serves as it is; others are cut off from their graph.

    Args:
        parameters: the leaves in the place of the blocks' parameters, by the identity of these: an argument that is
            one of them stays the same object.
    """
    found = []
    for tensor, kind, need in zip(tensors, kinds, needs, strict=True):
        if id(tensor) in parameters:
            tensor = parameters[id(tensor)]
        elif tensor.requires_grad:
            tensor = kind.given_to(tensor.detach().requires_grad_(need))
        else:
            kind.replay(tensor)
        found.append(tensor)
    return found


def parameter_leaves(held: Sequence[HeldParameter], tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Leaves to differentiate for, which the blocks hold as parameters until the `restoring` around this ends.

    A block's own parameter serves where it is still that of the forward pass. It is not after
    torch.func.functional_call or under saved-tensor hooks; a parameter that is computed has a graph of its own; and
    hooks on a parameter must fire once, when its whole gradient is known, not here.

    Args:
        tensors: the parameters, as autograd saved them.
    """
    found = []
    for parameter, tensor, need in zip(held, tensors, needs, strict=True):
        if parameter.shard is not None:
            found.append(gathered(parameter.shard, need))
            continue
        slots = parameter.slots
        is_own = all(slot.get() is tensor for slot in slots)
        if not (is_own and tensor.is_leaf) or tensor.requires_grad != need or tensor._backward_hooks:
            tensor = Kind.of(parameter.tensor).given_to(tensor.detach().requires_grad_(need))
            put(slots, [tensor] * len(slots))
        found.append(tensor)
    return found


class BlockVjps:
    """The vector-Jacobian products of step n's blocks for the leaves, summed over the blocks; None where zero.

    Args:
        needs_x: whether the product for the step's starting state is wanted.
        auxiliaries: where the blocks leave theirs.
        auxiliary_cotangents: of each block's; None for zero.
        may_use_strangers: whether blocks may use tensors with gradients that are not among the leaves.
    """

    def __init__(
        self,
        n: int,
        leaves: Sequence[Tensor],
        needs_x: bool,
        auxiliaries: Auxiliaries,
        auxiliary_cotangents: Sequence[Tensor | None],
        may_use_strangers: bool,
    ) -> None:
        self.found: list[Tensor | None] = [None] * len(leaves)
        self._n, self._leaves = n, leaves
        self._is_point_wanted = needs_x
        self._auxiliaries = auxiliaries
        self._auxiliary_cotangents = list(auxiliary_cotangents)
        self._may_use_strangers = may_use_strangers

    def linearize(self, f: BlockFunction, x: Tensor) -> tuple[Tensor | None, Vjp]:
        """f(x), and its vector-Jacobian product, which adds the leaves' gradients to those found."""
        point = x.detach().requires_grad_(self._is_point_wanted)
        g_auxiliary = self._auxiliary_cotangents.pop(0) if self._auxiliary_cotangents else None
        out, auxiliary = self._evaluate(f, point)
        roots = [out] if auxiliary is None or g_auxiliary is None else [out, auxiliary]
        if self._may_use_strangers:
            self._check_all_found(f, point, roots)
        # The next block's input depends on this one's output.
        self._is_point_wanted = self._is_point_wanted or out.requires_grad

        def vjp(cotangent: Tensor) -> Tensor | None:
            g = cotangent if cotangent.dtype == out.dtype else cotangent.to(out.dtype)
            cotangents = [g] if g_auxiliary is None else [g, g_auxiliary]
            return self._vjp([point, *self._leaves], roots, cotangents[: len(roots)])

        return out.detach(), vjp

    def _evaluate(self, f: BlockFunction, point: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's output, and what it returned beside it."""
        self._auxiliaries.clear()
        with torch.enable_grad():
            out = f(point)
        refuse_hooks(self._n, point)
        return out, self._auxiliaries[0] if self._auxiliaries else None

    def _vjp(self, known: Sequence[Tensor], roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor | None:
        wanted = list({id(tensor): tensor for tensor in known if tensor.requires_grad}.values())
        differentiable = [(root, g) for root, g in zip(roots, cotangents, strict=True) if root.requires_grad]
        if not (wanted and differentiable):
            return None
        by_tensor = dict(zip(map(id, wanted), self._differentiated(differentiable, wanted), strict=True))
        # A leaf in two places, an argument that is a parameter, has its gradient in the first of them.
        self._add([by_tensor.pop(id(leaf), None) for leaf in self._leaves])
        return by_tensor.get(id(known[0]))

    def _differentiated(
        self, given: Sequence[tuple[Any, Tensor]], wanted: Sequence[Any], keeps_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The products of the cotangents, given with their roots, for what is wanted: tensors or edges of the graph."""
        roots, cotangents = zip(*given, strict=True)
        try:
            return torch.autograd.grad(roots, wanted, cotangents, retain_graph=keeps_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"ResidualStack: the blocks of step {self._n} must not use reentrant checkpointing with "
                'gradient="adjoint"; pass use_reentrant=False to torch.utils.checkpoint'
            ) from error

    def _add(self, products: Sequence[Tensor | None]) -> None:
        """Add what was found for each leaf."""
        for place, product in enumerate(products):
            before = self.found[place]
            if product is not None:
                self.found[place] = product if before is None else before + product

    def _check_all_found(self, f: BlockFunction, point: Tensor, roots: Sequence[Tensor]) -> None:
        """Raise if the block's output depends on a tensor from outside that has gradients and is not among the leaves.

        Leaves that the block makes itself are its own affair. They are others in another evaluation.
        """
        known = {id(point), *map(id, self._leaves)}
        found = strangers(_nodes(roots), known)
        if not found:
            return
        again = {id(tensor) for tensor in strangers(_nodes(self._evaluate(f, point)), known)}
        for tensor in found:
            if id(tensor) in again:
                raise RuntimeError(
                    f"ResidualStack: the blocks of step {self._n} use a tensor of shape {list(tensor.shape)} that "
                    "needs gradients and is neither their parameter nor an argument of the stack; register it as "
                    "nn.Parameter, pass it to the stack, or detach it"
                )


def refuse_hooks(n: int, point: Tensor) -> None:
    """Raise if a block has registered hooks on its input."""
    if point._backward_hooks:
        raise RuntimeError(
            f"ResidualStack: the blocks of step {n} must not register hooks on their input, which is the state itself "
            "and has more of a gradient than theirs; register them on a tensor that the block computes"
        )


def _nodes(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The nodes of autograd's graph that tensors are the results of, or where their gradients are added up."""
    return [get_gradient_edge(tensor).node for tensor in tensors if tensor is not None and tensor.requires_grad]


def strangers(roots: Sequence[Any], known: set[int], ends: Sequence[Any] = ()) -> list[Tensor]:
    """Leaves of the graph of these nodes that are not known by their identity.

    Args:
        ends: nodes that the search does not pass.
    """
    found, seen, pending = [], set(ends), list(roots)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in known:
            found.append(node.variable)
    return found
