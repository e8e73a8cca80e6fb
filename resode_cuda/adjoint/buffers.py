"""The buffers of a block's modules: what they held before an evaluation, and which of them it wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .restoration import Slot, put

# In training these normalise with the statistics of the batch, and only write their running ones; else they only read.
_NORMS = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}

STATISTICS = 2**14
"""The largest number of elements of a floating buffer that may hold statistics which torch's kernels write."""


def buffer_slots(module: nn.Module) -> list[Slot]:
    return [Slot(module._buffers, name) for name in module._buffers]


def work_on_copies(modules: Iterable[nn.Module]) -> None:
    """Modules work on copies of their buffers, until the `restoring` around this ends."""
    slots = [slot for module in modules for slot in buffer_slots(module)]
    put(slots, [None if buffer is None else buffer.clone() for buffer in (slot.get() for slot in slots)])


class Buffer(NamedTuple):
    """A buffer before an evaluation."""

    slot: Slot
    tensor: Tensor | None
    version: int
    copy: Tensor | None
    """Its value; None where there is none, or where the module only writes it or only reads it."""
    is_write_only: bool

    @classmethod
    def of(cls, slot: Slot, module: nn.Module) -> Buffer:
        tensor = slot.get()
        if tensor is None:
            return cls(slot, None, 0, None, False)
        is_norm = type(module).forward in _NORMS
        copy = None if is_norm else tensor.clone()
        return cls(slot, tensor, tensor._version, copy, is_norm and module.training)

    def is_written(self) -> bool:
        """Whether an evaluation since then may have written it.

        torch's kernels write running statistics without counting a new version, so values are compared. On a GPU the
        comparison would wait for it; there small buffers count as written, large ones where their version says so.
        """
        now = self.slot.get()
        if self.is_write_only or now is not self.tensor:
            return True
        if now is None or self.tensor is None:
            return False
        if now._version != self.version:
            return True
        if self.copy is None or not now.is_floating_point():
            return False
        if now.device.type == "cpu":
            return not torch.equal(now, self.copy)
        return now.numel() <= STATISTICS

    def without_copy(self) -> Buffer:
        return self._replace(copy=None)

    def scratch(self) -> Tensor | None:
        """A tensor with the value it had, for a re-evaluation to write."""
        if self.copy is not None:
            return self.copy.clone()
        return None if self.tensor is None else self.tensor.clone()

    def unchanged(self) -> Tensor | None:
        """The tensor itself, for a re-evaluation to read."""
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"ResidualStack: between forward and backward a block's buffers must not be modified, but "
                f"{self.slot.name!r} of shape {list(self.tensor.shape)} was; modify it after backward"
            )
        return self.tensor
