"""The buffers of a block's modules: what they held before an evaluation, and which of them it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .inventory import Inventory
from .restoration import Slot, hide, put

# In training these normalise with the statistics of the batch, and only write their running ones; else they only read.
_NORMS = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}

STATISTICS = 2**14
"""The largest number of values of a floating buffer that counts as written on a GPU, where it may hold statistics that
torch's kernels write, and of a tensor among the attributes whose value is kept."""


def buffer_slots(module: nn.Module) -> list[Slot]:
    return [Slot(module._buffers, name) for name in module._buffers]


def work_on_copies(modules: Iterable[nn.Module]) -> None:
    """Modules work on copies of their buffers, until the `restoring` around this ends."""
    slots = [slot for module in modules for slot in buffer_slots(module)]
    put(slots, _copies([slot.get() for slot in slots]))


@dataclass
class _Buffer:
    """A buffer before an evaluation."""

    slot: Slot
    module: nn.Module
    was_training: bool
    tensor: Tensor | None
    version: int
    copy: Tensor | None = None
    """Its value; after the evaluation None where the module only wrote it, or did not write it."""
    is_written: bool = True
    """Whether the evaluation may have written it; until it has ended it may."""

    @property
    def is_rebound(self) -> bool:
        """Whether another tensor stands in its place."""
        return self.slot.get() is not self.tensor

    @property
    def is_large_attribute(self) -> bool:
        is_attribute = self.slot.owner is vars(self.module)
        return is_attribute and self.tensor is not None and self.tensor.numel() > STATISTICS

    def evaluated(self) -> None:
        is_norm = type(self.module).forward in _NORMS
        is_write_only = is_norm and self.was_training and self.module.training
        self.is_written = is_write_only or self._is_changed(is_norm)
        if self.is_written and self.is_large_attribute:
            raise RuntimeError(
                f"ResidualStack: a block must not write a tensor of more than {STATISTICS} values among its "
                f"attributes, of which no copy is kept, but it wrote {self.slot.name!r}; register it as a buffer"
            )
        if is_write_only or not self.is_written:
            self.copy = None

    def _is_changed(self, is_norm: bool) -> bool:
        """Whether the evaluation may have written the buffer.

        torch's kernels write running statistics without counting a new version, so values are compared. On a GPU the
        comparison would wait for it; there small buffers count as written, large ones where their version says so.
        """
        if self.is_rebound:
            return True
        if self.tensor is None:
            return False
        if _version(self.tensor) != self.version:
            return True
        if self.copy is None or not _is_plain(self.tensor):
            return False
        if self.tensor.device.type == "cpu":
            return not torch.equal(self.tensor, self.copy)
        return self.tensor.is_floating_point() and self.tensor.numel() <= STATISTICS and not is_norm

    def check(self) -> None:
        """Raise if a buffer that the evaluation has only read was modified since then."""
        if self.tensor is not None and _version(self.tensor) != self.version:
            raise RuntimeError(
                f"ResidualStack: between forward and backward a block's buffers must not be modified, but "
                f"{self.slot.name!r} of shape {list(self.tensor.shape)} was; modify it after backward"
            )


class Buffers:
    """The buffers of a block's modules, and tensors among their attributes, before an evaluation, and what a
    re-evaluation must find in their places."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._buffers: list[_Buffer] = []
        self._new: list[Slot] = []
        """Slots of buffers that the evaluation registered."""
        if inventory.has_state:
            self._read()

    def _read(self) -> None:
        slots = []
        for module, attributes in zip(self._inventory.modules, self._inventory.attributes, strict=True):
            slots += [(slot, module) for slot in buffer_slots(module)]
            slots += [(Slot(vars(module), name), module) for name in attributes.tensors]
        self._buffers = [
            _Buffer(slot, module, module.training, slot.get(), _version(slot.get())) for slot, module in slots
        ]
        copied = [buffer for buffer in self._buffers if not buffer.is_large_attribute]
        for buffer, copy in zip(copied, _copies([buffer.tensor for buffer in copied]), strict=True):
            buffer.copy = copy

    def evaluated(self) -> None:
        """The evaluation has ended: keep the values of those buffers alone that it has written and may have read."""
        if not self._inventory.is_current():
            self._new = self._registered()
        # An attribute that keeps what was computed last may have kept something large before, which is seldom read.
        self._buffers = [buffer for buffer in self._buffers if not (buffer.is_large_attribute and buffer.is_rebound)]
        for buffer in self._buffers:
            buffer.evaluated()

    @property
    def are_written(self) -> bool:
        return bool(self._new) or any(buffer.is_written for buffer in self._buffers)

    def _registered(self) -> list[Slot]:
        known = {(id(buffer.slot.owner), buffer.slot.name) for buffer in self._buffers}
        slots = (slot for module in self._inventory.modules for slot in buffer_slots(module))
        return [slot for slot in slots if (id(slot.owner), slot.name) not in known]

    def rewind(self) -> None:
        """Give the modules their buffers as they were, while the evaluation has not ended."""
        for buffer in self._buffers:
            buffer.slot.owner[buffer.slot.name] = buffer.tensor
            if buffer.tensor is not None and buffer.copy is not None and not torch.equal(buffer.tensor, buffer.copy):
                buffer.tensor.copy_(buffer.copy)
        for slot in self._registered():
            del slot.owner[slot.name]

    def replay(self) -> None:
        """Have modules work on copies of the buffers that they wrote, as they were, until the `restoring` around this
        ends, and see the others.

        Raises:
            RuntimeError: if one of those others was modified meanwhile.
        """
        if not (self._buffers or self._new):
            return
        written = [buffer for buffer in self._buffers if buffer.is_written]
        scratch = _copies([buffer.tensor if buffer.copy is None else buffer.copy for buffer in written])
        put([buffer.slot for buffer in written], scratch)
        for buffer in self._buffers:
            if not buffer.is_written:
                buffer.check()
                if buffer.is_rebound:
                    put([buffer.slot], [buffer.tensor])
        for slot in self._new:
            if slot.name in slot.owner:
                hide(slot)


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies, of which those share memory whose originals do."""
    shared = _shared_memory(tensors)
    copied: dict[int, torch.UntypedStorage] = {}
    found: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None or not _is_plain(tensor) or tensor.untyped_storage().data_ptr() not in shared:
            found.append(None if tensor is None else tensor.clone())
            continue
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in copied:
            copied[memory.data_ptr()] = memory.clone()
        copy = copied[memory.data_ptr()]
        found.append(tensor.new_empty(0).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return found


def _shared_memory(tensors: Sequence[Tensor | None]) -> set[int]:
    """The addresses of memory that several of the tensors use, or one of them more than once for different values."""
    plain = [tensor for tensor in tensors if tensor is not None and _is_plain(tensor)]
    if not plain:
        return set()
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in plain)
    expanded = {t.untyped_storage().data_ptr() for t in plain if t.numel() * t.itemsize > t.untyped_storage().nbytes()}
    return expanded | {address for address, count in users.items() if count > 1}


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of the usual kind, which can be copied and compared."""
    return not tensor.is_nested and tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Buffer)
