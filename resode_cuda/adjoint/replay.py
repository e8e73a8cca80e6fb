"""Running a block again exactly as it first ran.

The reconstruction is only as good as the re-evaluation: another dropout mask, another autocast state or a power
iteration further along is another function. What a re-evaluation needs is recorded when the block first runs. Of what
is large only that is kept which differs from what any later moment would give: the states of generators that the block
drew from, buffers that it changed. Whatever happens inside, generators, settings, attributes, buffers and parameters of
the surrounding program are back as they were when a re-evaluation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from .attributes import Attributes
from .buffers import Buffers, work_on_copies
from .capture import draws_are_replayable
from .generators import Drawn, Generators
from .restoration import Slot, put, restoring
from .surroundings import Surroundings, turn_caches_off

T = TypeVar("T")


def submodules(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks and all modules inside them, each once. (`Module.modules` builds every name on the way.)"""
    found: dict[nn.Module, None] = {}
    pending = list(blocks)
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            pending.extend(child for child in module._modules.values() if child is not None)
    return list(found)


def protect(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Modules work on copies of their buffers and tensor attributes; these, their other attributes and all random
    generators are as they are now when the `restoring` around this ends."""
    modules = list(modules)
    Generators(device).restore_later()
    for module in modules:
        attributes = Attributes(module)
        attributes.replay()
        slots = [Slot(vars(module), name) for name in attributes.tensors]
        put(slots, [slot.get().clone() for slot in slots])
    work_on_copies(modules)


class Replayed:
    """A block's evaluation: `record` runs it for the first time, `again` runs it in the same way.

    Args:
        modules: the block and all modules inside it.
        device: of the state.
        generators: of the forward pass that this evaluation is part of.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, generators: Generators) -> None:
        self.modules, self.generators = modules, generators
        self.device_types = sorted({device.type, "cpu"} - {"meta"})
        self.surroundings: Surroundings | None = None
        self.attributes: list[Attributes] = []
        self.drawn: Drawn | None = None
        """None until the first evaluation has ended."""
        self.buffers: Buffers | None = None
        self.left_behind: list[str] = []
        """Attributes in which the last re-evaluation left tensors that have gradients; they have been taken off."""

    @property
    def is_function(self) -> bool:
        """Whether the block drew no random numbers and wrote no buffers."""
        return not self.drawn and self.buffers is not None and not self.buffers.are_written

    def record(self, run: Callable[[], T]) -> T:
        self.surroundings = Surroundings.now(self.device_types)
        self.attributes = [Attributes(module) for module in self.modules]
        self.buffers = Buffers(self.modules, [attributes.tensors for attributes in self.attributes])

        def first() -> T:
            turn_caches_off()
            with draws_are_replayable():
                return run()

        out = restoring(first)
        self.drawn = self.generators.drawn_since_last()
        for attributes in self.attributes:
            attributes.evaluated()
        self.buffers.evaluated()
        return out

    def again(self, run: Callable[[], T]) -> T:
        surroundings, buffers = self.surroundings, self.buffers
        assert surroundings is not None, "record comes first"
        assert buffers is not None

        def repeated() -> T:
            turn_caches_off()
            self.generators.restore_torchs()
            # A block that differentiates inside a checkpointed step is run again while it still runs.
            (self.generators.drawn_so_far() if self.drawn is None else self.drawn).replay()
            surroundings.replay()
            for attributes in self.attributes:
                attributes.replay()
            buffers.replay()
            out = self._run(run)
            if torch.is_grad_enabled():
                self.left_behind = [name for attributes in self.attributes for name in attributes.left_behind()]
            return out

        return restoring(repeated)

    def _run(self, run: Callable[[], T]) -> T:
        try:
            return run()
        except RuntimeError as error:
            if not ("vmap" in str(error) and "random" in str(error)):
                raise
            raise RuntimeError(
                "ResidualStack: blocks that draw random numbers cannot be run again for a batch of gradients "
                '(is_grads_batched=True); ask for one gradient at a time, or use gradient="backprop"'
            ) from error
