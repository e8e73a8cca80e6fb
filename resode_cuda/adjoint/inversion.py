"""x_0 from x_N by a reverse solver alone, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..method import Method
from ..reverse import Reverse, extrapolate, predict
from ..schemes import increment
from .block_arguments import Call
from .blocks import Block
from .buffers import work_on_copies
from .inventory import submodules
from .restoration import restoring


def inverted(method: Method, blocks: Sequence[Block], state: Tensor, call: Call) -> Tensor:
    """x_0 from the state x_N. Blocks work on copies of their buffers."""
    if method.solver.is_stored:
        method = replace(method, solver=Reverse("step"))
    scheme = method.scheme

    def undone(n: int, state: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x_n from x_{n+1}, and the increment where the solver knows it."""
        used, h = blocks[method.blocks_of(n)], method.steps[n]
        work_on_copies(submodules(block.module for block in used))
        functions = [block.function(call, []) for block in used]
        y = predict(method.solver, scheme, functions, state, h, predicted)
        if not method.reuses:
            return y, None
        stages = scheme.stages(functions, y, h)
        state = scheme.add(state, stages, -h)
        return state, increment(scheme, stages, h, state) if method.extrapolates else None

    later: list[Tensor] = []  # the increments of the steps undone so far, newest first
    for n in reversed(range(len(method))):
        predicted = None
        if method.extrapolates and len(later) == 2:
            predicted = extrapolate(method.weights[n], state, *later)
        state, d = restoring(partial(undone, n, state, predicted))
        if d is not None:
            later = [d, *later[:1]]
    return state
