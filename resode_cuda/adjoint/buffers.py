"""The buffers of a block's modules: what they held before an evaluation, and which of them it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .restoration import Slot, hide, put

# In training these normalise with the statistics of the batch, and only write their running ones; else they only read.
_NORMS = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}

STATISTICS = 2**14
"""The largest number of elements of a floating buffer that may hold statistics which torch's kernels write."""


def buffer_slots(module: nn.Module) -> list[Slot]:
    """The module's buffers, and the tensors among its attributes that serve as such."""
    attributes = vars(module)
    found = [Slot(module._buffers, name) for name in module._buffers]
    found += [Slot(attributes, name) for name, value in attributes.items() if _is_attribute(value)]
    return found


def _is_attribute(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad


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
    copy: Tensor | None
    """Its value; after the evaluation None where the module only wrote it, or did not write it."""
    is_written: bool = True
    """Whether the evaluation may have written it; until it has ended it may."""

    @property
    def is_rebound(self) -> bool:
        """Whether another tensor stands in its place."""
        return self.slot.get() is not self.tensor

    @property
    def is_attribute(self) -> bool:
        return self.slot.owner is vars(self.module)

    def evaluated(self) -> None:
        is_norm = type(self.module).forward in _NORMS
        is_write_only = is_norm and self.was_training and self.module.training
        self.is_written = is_write_only or self._is_changed(is_norm)
        if is_write_only or not self.is_written:
            self.copy = None

    def _is_changed(self, is_norm: bool) -> bool:
        """Whether the evaluation may have written the buffer.

        torch's kernels write running statistics without counting a new version, so values are compared. On a GPU the
        comparison would wait for it; there small buffers count as written, large ones where their version says so.
        """
        if self.is_rebound:
            return True
        if self.tensor is None or self.copy is None:
            return False
        if _version(self.tensor) != self.version:
            return True
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
    """The buffers of some modules before an evaluation, and what a re-evaluation must find in their places."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        slots = [(slot, module) for module in modules for slot in buffer_slots(module)]
        tensors = [slot.get() for slot, _ in slots]
        self._buffers = [
            _Buffer(slot, module, module.training, tensor, _version(tensor), copy)
            for (slot, module), tensor, copy in zip(slots, tensors, _copies(tensors), strict=True)
        ]
        self._new: list[Slot] = []
        """Slots of buffers that the evaluation registered."""

    def evaluated(self) -> None:
        """The evaluation has ended: keep the values of those buffers alone that it has written and may have read."""
        known = {(id(buffer.slot.owner), buffer.slot.name) for buffer in self._buffers}
        self._new = [
            Slot(module._buffers, name)
            for module in self._modules
            for name in module._buffers
            if (id(module._buffers), name) not in known
        ]
        # An attribute that keeps what was computed last may have kept something large before, which is seldom read.
        self._buffers = [buffer for buffer in self._buffers if not (buffer.is_attribute and buffer.is_rebound)]
        for buffer in self._buffers:
            buffer.evaluated()

    def replay(self) -> None:
        """Have modules work on copies of the buffers that they wrote, as they were, until the `restoring` around this
        ends, and see the others.

        Raises:
            RuntimeError: if one of those others was modified meanwhile.
        """
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
    plain = [tensor for tensor in tensors if tensor is not None and _is_plain(tensor)]
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in plain)
    memory: dict[int, torch.UntypedStorage] = {}
    found: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None or not _is_plain(tensor) or storages[tensor.untyped_storage().data_ptr()] == 1:
            found.append(None if tensor is None else tensor.clone())
            continue
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in memory:
            memory[address] = storage.clone()
        alias = tensor.new_empty(0)
        found.append(alias.set_(memory[address], tensor.storage_offset(), tensor.shape, tensor.stride()))
    return found


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Buffer)
