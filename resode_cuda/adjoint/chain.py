"""Steps that are taken one at a time: by a stack, or by a model's own loop, which may end or go on wherever it likes.

The steps of a chain are autograd nodes that hand the rebuilt state to each other (`node`). What a stack knows before,
that a step is the last one, a loop does not tell. So an open chain holds what its latest step would have to save if it
were the last: the state after it, or its companion. It is held once, however long the chain, and given to the backward
pass where that begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..method import Method
from ..stored import companion_dtype
from .blocks import modified_in_place
from .drift import DriftMonitor
from .generators import Generators
from .reevaluation import Increments
from .step import Step, shadow_count, steps_of


class Chain:
    """Steps of a stack that follow each other.

    It must not hold what has a graph, since the graph holds it.

    Args:
        x: the state that they start from.
        is_open: whether the caller may stop after any step. Steps have h = 1 then, or what the caller does with a state
            in between would be weighted.
    """

    def __init__(self, method: Method, x: Tensor, monitor: DriftMonitor, *, is_open: bool = False) -> None:
        self.method, self.monitor, self.is_open = method, monitor, is_open
        self.steps = steps_of(method)
        self.blank = x.new_zeros(())
        self.generators = Generators(x.device)
        self.increments = Increments(x, method, monitor.measured(method))
        self.first_users: dict[Any, int] = {}
        """The first step with a backward pass that uses a module that FSDP shards, by FSDP's state of that."""
        self._end: tuple[int, Tensor, int] | None = None
        self._outputs: dict[int, tuple[Callable[[], Tensor | None], int]] = {}

    def renew_generators(self) -> None:
        """A step is to be taken, before which others may have drawn random numbers."""
        self.generators = Generators(self.blank.device)

    @property
    def first_shadows(self) -> tuple[None, ...]:
        """Those of the first step."""
        return (None,) * shadow_count(self.method)

    def took(self, step: Step, x_next: Tensor, shadows: Sequence[Tensor]) -> None:
        """The step is the latest one."""
        if self.is_open:
            state = shadows[0] if step.is_stored and shadows else x_next
            self._end = (step.n, state.detach(), state._version) if _needs_end(step) else None

    def used(self, step: Step, fsdp_states: Iterable[Any]) -> None:
        """The step's blocks are, or contain, modules that FSDP shards."""
        for state in fsdp_states:
            self.first_users.setdefault(state, step.n)

    def gave(self, step: Step, x_next: Tensor) -> None:
        """The caller has x_{n+1}, which serves as long as somebody holds it."""
        if self.is_open:
            self._outputs[step.n] = weakref.ref(x_next), x_next._version

    def end_of(self, step: Step) -> Tensor | None:
        """x_{n+1}, or its companion, where the backward pass begins with a step; None where it is known no more.

        Raises:
            RuntimeError: if it was modified in place.
        """
        if not _needs_end(step):
            return None
        if self._end is not None and self._end[0] == step.n:
            return _copied(*self._end[1:])
        get, version = self._outputs.get(step.n, (lambda: None, 0))
        output = get()
        if output is None:
            return None
        return _copied(output, version).to(companion_dtype(output.dtype) if step.is_stored else output.dtype)


def _needs_end(step: Step) -> bool:
    """Whether the step's backward pass takes more than what it has saved itself."""
    if step.method.solver.is_stored:
        return step.is_stored and not step.ends_segment
    return not step.is_last


def _copied(state: Tensor, version: int) -> Tensor:
    if state._version != version:
        raise modified_in_place()
    return state.detach().clone()
