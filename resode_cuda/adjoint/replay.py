"""Running a block again exactly as it first ran.

The reconstruction is only as good as the re-evaluation: another dropout mask, another autocast state or a power
iteration further along is another function. What a re-evaluation needs is recorded when the block first runs. Of what
is large only that is kept which differs from what any later moment would give: the states of generators that the block
drew from, buffers that it changed. Whatever happens inside, generators, settings, attributes, buffers and parameters of
the surrounding program are back as they were when a re-evaluation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from .attributes import Attributes, Containers
from .buffers import Buffers, work_on_copies
from .capture import draws_are_replayable
from .generators import Drawn, Generators
from .inventory import Entries, Inventory
from .restoration import Slot, put, restoring, undo_later
from .surroundings import Surroundings, turn_caches_off

T = TypeVar("T")


def protect(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Modules work on copies of their buffers and tensor attributes; these, their other attributes and all random
    generators are as they are now when the `restoring` around this ends."""
    modules = list(modules)
    Generators(device).restore_later()
    undo_later(Entries(modules).restore)
    attributes = [Attributes(module) for module in modules]
    Containers(attributes).replay()
    slots = [Slot(vars(module), name) for module, of in zip(modules, attributes, strict=True) for name in of.tensors]
    put(slots, [slot.get().clone() for slot in slots])
    work_on_copies(modules)


class Replayed:
    """A block's evaluation: `record` runs it for the first time, `again` runs it in the same way.

    Args:
        inventory: what the block's modules hold before it.
        device: of the state.
        generators: of the forward pass that this evaluation is part of.
    """

    def __init__(self, inventory: Inventory, device: torch.device, generators: Generators) -> None:
        self.inventory, self.generators = inventory, generators
        self.surroundings = Surroundings.now(device.type)
        self.buffers = Buffers(inventory)
        self.containers = Containers(inventory.attributes) if inventory.has_state else None
        self.drawn: Drawn | None = None
        """None until the first evaluation has ended."""
        self.left_behind: list[str] = []
        """Attributes in which the last evaluation left tensors that have gradients; these have been taken off."""

    @property
    def is_function(self) -> bool:
        """Whether the block drew no random numbers and wrote no buffers."""
        return not self.drawn and not self.buffers.are_written

    def record(self, run: Callable[[], T], takes_graphs_off: bool = False) -> T:
        """run() for the first time.

        Args:
            takes_graphs_off: those of tensors that it leaves behind.
        """

        def first() -> T:
            turn_caches_off()
            with draws_are_replayable():
                return run()

        out = restoring(first)
        if takes_graphs_off:
            self.left_behind = self._detach_left()
        self.drawn = self.generators.drawn_since_last()
        if self.containers is not None:
            self.containers.evaluated()
        self.buffers.evaluated()
        return out

    def rewind(self) -> None:
        """Undo what `record` has drawn and written before it raised."""
        self.generators.rewind()
        self.buffers.rewind()
        self.inventory.entries.restore()
        if self.containers is not None:
            self.containers.rewind()

    def again(self, run: Callable[[], T]) -> T:
        def repeated() -> T:
            turn_caches_off()
            self.generators.restore_torchs()
            # A block that differentiates inside a checkpointed step is run again while it still runs.
            (self.generators.drawn_so_far() if self.drawn is None else self.drawn).replay()
            self.surroundings.replay()
            before = self._replay_attributes()
            self.buffers.replay()
            out = self._run(run)
            if torch.is_grad_enabled():
                self.left_behind = self._left_since(before)
            return out

        return restoring(repeated)

    def _replay_attributes(self) -> Entries:
        """Make attributes what they were; returns those that the `restoring` around this ends with."""
        entries = before = self.inventory.entries
        if not entries.are_current():
            before = Entries(self.inventory.modules)
        undo_later(before.restore)
        if before is not entries:
            for attributes, held in zip(self.inventory.attributes, entries.copies, strict=True):
                attributes.replay(held)
        if self.containers is not None:
            self.containers.replay()
        return before

    def _left_since(self, before: Entries) -> list[str]:
        names = [] if self.containers is None else self.containers.left_behind()
        if not before.are_current():
            for attributes, held in zip(self.inventory.attributes, before.copies, strict=True):
                names += attributes.left_behind(held)
        return names

    def _detach_left(self) -> list[str]:
        names = [] if self.containers is None else self.containers.detach_left()
        entries = self.inventory.entries
        if not entries.are_current():
            for attributes, held in zip(self.inventory.attributes, entries.copies, strict=True):
                names += attributes.left_behind(held)
                attributes.detach_left(held)
        return names

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
