"""Exact gradients from one stored state per step: each step's increment is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..method import Method
from ..schemes import BlockFunction, Stages
from ..schemes import step as take_step
from .block_arguments import Arguments, Versions
from .blocks import Auxiliaries, Block, BlockCall, Formats, held_parameters, modified_in_place
from .drift import DriftMonitor
from .generators import Generators
from .outputs import Outputs
from .reevaluation import Sample
from .restoration import put, restoring, undo_later


def propagate(
    method: Method, blocks: Sequence[Block], x: Tensor, arguments: Arguments, monitor: DriftMonitor
) -> Outputs:
    """x_N from x_0 and all states between, with torch's non-reentrant checkpointing of every step.

    The blocks replay themselves, buffers included, which torch's own preserve_rng_state does not. In each pass one step
    in turn is recomputed to its end, and compared; the others stop before the operations that gradients don't need.
    """
    arguments.refuse_iterators()
    arguments.refuse_caches()
    generators = Generators(x.device)
    outputs = Outputs(x, [], {0: x})
    compared = monitor.recomputed()
    for n in range(len(method)):
        used = blocks[method.blocks_of(n)]
        calls = [BlockCall(block, x.device, generators, stage) for stage, block in enumerate(used)]
        step = _Step(method, n, calls, arguments, monitor if n == compared else None)
        with set_checkpoint_early_stop(n != compared):
            x, *auxiliaries = checkpoint(step, x, use_reentrant=False, preserve_rng_state=False)
        outputs.auxiliaries.extend(auxiliaries)
        outputs.states[n + 1] = x
    arguments.release()
    generators.release()
    return outputs._replace(last=x)


class _Step:
    """x_{n+1} from x_n, by the same tensors whenever it is called; torch's checkpointing looks after x alone."""

    def __init__(
        self,
        method: Method,
        n: int,
        calls: Sequence[BlockCall],
        arguments: Arguments,
        monitor: DriftMonitor | None,
    ) -> None:
        self.n, self.scheme, self.h = n, method.scheme, method.steps[n]
        self.calls, self.arguments, self.monitor = calls, arguments, monitor
        self.numbers: Tensor | None = None
        self.tensors = list(arguments.tensors)
        self.parameters = held_parameters(calls)
        self.formats = Formats(self.parameters)
        self.needs = [(p.tensor, p.tensor.requires_grad) for p in self.parameters if p.tensor.is_leaf]
        self.versions = Versions([*self.tensors, *(parameter.tensor for parameter in self.parameters)])
        self.is_first = True

    def __call__(self, x: Tensor) -> Any:
        if self.versions.written() is not None:
            raise modified_in_place()
        return restoring(lambda: self._moved(x))

    def _moved(self, x: Tensor) -> Any:
        for parameter in self.parameters:
            if parameter.shard is None:
                put(parameter.slots, [parameter.tensor] * len(parameter.slots))
        self.formats.check()
        for tensor, needs in self.needs:
            if tensor.requires_grad != needs:
                undo_later(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(needs)
        auxiliaries: Auxiliaries = []
        is_first, self.is_first = self.is_first, False
        if is_first:
            functions = [call.first(self.arguments, auxiliaries) for call in self.calls]
        else:
            # Hooks that a block registers on its input stand on the state already.
            x = x.detach().requires_grad_(x.requires_grad)
            for tensor, kind in zip(self.tensors, self.arguments.kinds, strict=True):
                kind.replay(tensor)
            functions = [_again(call, self.tensors, auxiliaries) for call in self.calls]
        x_next, stages = take_step(self.scheme, functions, x, self.h)
        if self.monitor is not None and (is_first or self.numbers is not None):
            with torch.no_grad():
                self._compare(stages, x, self.monitor)
        return x_next, *auxiliaries

    def _compare(self, stages: Stages, x: Tensor, monitor: DriftMonitor) -> None:
        sample = Sample(x)
        f = sample.increment(stages, self.n)
        numbers = sample.project(f, f.new_empty(2))
        if self.numbers is None:
            self.numbers = numbers
        else:
            monitor.check_recomputed(self.calls[0].block.index, self.numbers, numbers)


def _again(call: BlockCall, tensors: Sequence[Tensor], auxiliaries: Auxiliaries) -> BlockFunction:
    """The block run again.

    Where a block differentiates inside, the step runs again before it has ended: later blocks have not run yet.
    """
    return _itself if call.given is None else call.again(tensors, auxiliaries)


def _itself(x: Tensor) -> Tensor:
    return x
