"""A copy of a stack in float64, whose steps are evaluated without a trace and alike each time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..adjoint.block_arguments import Call
from ..adjoint.inventory import submodules
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring
from ..schemes import BlockFunction
from ..schemes import step as take_step
from ..squares import square_dtype
from ..stack import ResidualStack
from .spectrum import largest_eigenvalue

T = TypeVar("T")

PRODUCTS = 12
"""Products with a step's Jacobian, and with its transpose, that an eigenvalue is taken from."""
NEARBY = 1e-5
"""Distance of the points of a difference quotient, relative to the state."""


class Probe:
    """A stack at one batch.

    Args:
        stack: in its mode, train or eval. Random numbers are the same in every evaluation.
        x: x_0.
        args, kwargs: what blocks get beside the state.

    Attributes:
        stack: the copy, in float64 where the device has that.
        states: x_0 ... x_N of the copy.
    """

    def __init__(self, stack: ResidualStack, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dtype = square_dtype(x.device)
        self.stack = copy.deepcopy(stack).to(dtype)
        self.stack.stream_dtype = None if stack.stream_dtype is None else dtype
        self.method, self.scheme = self.stack._method, self.stack._method.scheme
        x, args, kwargs = pytree.tree_map(lambda leaf: _in(leaf, dtype), (x, args, kwargs))
        self.args, self.kwargs = args, kwargs
        self._call = Call(args, kwargs)
        self._blocks = self.stack._blocks_for(x)
        self.states = [x]
        for n in range(len(self.stack.steps)):
            self.states.append(self.states[n] + self.increment(n, self.states[n]))

    def with_blocks(self, n: int, run: Callable[[Sequence[BlockFunction]], T]) -> T:
        """run(the blocks of step n as functions of the state), after which all is as it was."""
        used = self._blocks[self.method.blocks_of(n)]

        def evaluated() -> T:
            protect(submodules(block.module for block in used), self.states[0].device)
            return run([block.function(self._call, []) for block in used])

        with torch.no_grad():
            return restoring(evaluated)

    def velocity(self, n: int, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """f_n(x), with these parameters in block n."""
        block = self._blocks[n]

        def evaluated() -> Tensor:
            protect(submodules((block.module,)), x.device)
            return block(x, self._call, [], parameters)

        with torch.no_grad():
            out = restoring(evaluated)
        return out - x if self.scheme.has_state_inside else out

    def increment(self, n: int, x: Tensor) -> Tensor:
        """Phi_n(x)."""
        h = self.stack.steps[n]
        return self.with_blocks(n, lambda used: take_step(self.scheme, used, x, h)[0] - x)

    def reverse_point(self, n: int) -> Tensor:
        """y of the exact x_{n+1}: the reverse step's first guess at x_n."""
        h = self.stack.steps[n]
        return self.with_blocks(n, lambda used: self.scheme.reverse_step(used, self.states[n + 1], h))

    def steepness(self, n: int) -> float:
        """The spectral norm of J, the Jacobian of Phi_n at x_n, from below."""

        def product(v: Tensor) -> Tensor:
            return self._vjp(n, self._jvp(n, v))

        return math.sqrt(max(0.0, largest_eigenvalue(product, _noise_like(self.states[n]), PRODUCTS)))

    def growth(self, n: int) -> float:
        """The spectral norm of I + J, what a step makes of an error at most, from below.

        All eigenvalues of (I + J)^T (I + J) are near 1; those of J^T J + J^T + J, which is 1 less, are told apart.
        """

        def product(v: Tensor) -> Tensor:
            image = self._jvp(n, v)
            return self._vjp(n, image + v) + image

        return math.sqrt(max(0.0, 1 + largest_eigenvalue(product, _noise_like(self.states[n]), PRODUCTS)))

    def _jvp(self, n: int, v: Tensor) -> Tensor:
        """J v, as a difference quotient over a short distance."""
        x = self.states[n]
        distance = NEARBY * max(x.norm().item(), torch.finfo(x.dtype).tiny)
        return (self.increment(n, x + distance * v) - self.increment(n, x - distance * v)) / (2 * distance)

    def _vjp(self, n: int, u: Tensor) -> Tensor:
        """J^T u, by autograd."""
        h = self.stack.steps[n]

        def product(used: Sequence[BlockFunction]) -> Tensor:
            point = self.states[n].detach().requires_grad_()
            with torch.enable_grad():
                moved = take_step(self.scheme, used, point, h)[0]
                (g,) = torch.autograd.grad(moved, point, u)
            return g - u

        return self.with_blocks(n, product)


def _in(leaf: Any, dtype: torch.dtype) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().to(dtype) if leaf.is_floating_point() else leaf.detach()
    return leaf


def _noise_like(x: Tensor) -> Tensor:
    """Standard normal values, the same at any time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
