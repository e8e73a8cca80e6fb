"""The vector-Jacobian products of a step's blocks, and the leaves that they are taken for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..schemes import BlockFunction, Vjp
from .blocks import HeldParameter
from .replay import swapped


@contextmanager
def leaves(
    held: Sequence[HeldParameter], tensors: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[Sequence[Tensor]]:
    """Leaves to differentiate for: the arguments' tensors, cut off from their graph, and the parameters, which the
    blocks hold meanwhile.

    The blocks' own parameters serve where they are still those of the forward pass. They do not after
    torch.func.functional_call or under saved-tensor hooks; and hooks on a parameter must fire once, when its whole
    gradient is known, not here.
    """
    argument_count = len(tensors) - len(held)
    found = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    parameters = tensors[argument_count:]
    places = [parameter.slots for parameter in held]
    if all(
        all(slot.get() is parameter for slot in slots)
        and parameter.requires_grad == need
        and not parameter._backward_hooks
        for slots, parameter, need in zip(places, parameters, needs[argument_count:], strict=True)
    ):
        yield (*found[:argument_count], *parameters)
    else:
        pairs = [(slot, leaf) for slots, leaf in zip(places, found[argument_count:], strict=True) for slot in slots]
        with swapped([slot for slot, _ in pairs], [leaf for _, leaf in pairs]):
            yield found


class BlockVjps:
    """The vector-Jacobian products of step n's blocks for the leaves, summed over the blocks; None where zero."""

    def __init__(self, n: int, leaves: Sequence[Tensor], needs_x: bool) -> None:
        self.found: list[Tensor | None] = [None] * len(leaves)
        self._n, self._leaves = n, leaves
        self._is_point_wanted = needs_x

    def linearize(self, f: BlockFunction, x: Tensor) -> tuple[Tensor, Vjp]:
        """f(x), and its vector-Jacobian product, which adds the leaves' gradients to those found."""
        point = x.detach().requires_grad_(self._is_point_wanted)
        with torch.enable_grad():
            out = f(point)
        # The next block's input depends on this one's output.
        self._is_point_wanted = self._is_point_wanted or out.requires_grad

        def vjp(cotangent: Tensor) -> Tensor | None:
            return self._vjp(point, out, cotangent.to(out.dtype))

        return out.detach(), vjp

    def _vjp(self, point: Tensor, out: Tensor, cotangent: Tensor) -> Tensor | None:
        wanted = [tensor for tensor in (point, *self._leaves) if tensor.requires_grad]
        if not out.requires_grad:
            return None
        _check_all_found(self._n, out, wanted)
        try:
            products = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"ResidualStack: the blocks of step {self._n} must not use reentrant checkpointing with "
                'gradient="adjoint"; pass use_reentrant=False to torch.utils.checkpoint'
            ) from error
        by_tensor = dict(zip(map(id, wanted), products, strict=True))
        for place, leaf in enumerate(self._leaves):
            product, before = by_tensor.get(id(leaf)), self.found[place]
            if product is not None:
                self.found[place] = product if before is None else before + product
        return by_tensor.get(id(point))


def _check_all_found(n: int, out: Tensor, wanted: Sequence[Tensor]) -> None:
    """Raise if a block's output depends on a tensor that needs gradients and is not among those wanted."""
    known = set(map(id, wanted))
    seen: set[Any] = set()
    pending: list[Any] = [out.grad_fn]
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
