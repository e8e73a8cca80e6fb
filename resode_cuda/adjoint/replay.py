"""Running a block again exactly as it first ran.

The reconstruction is only as good as the re-evaluation: another dropout mask, another autocast state or a power
iteration further along is another function. What a re-evaluation needs is recorded when the block first runs, and
kept only where it differs from what any later moment would give: RNG states for blocks that drew numbers, buffers
for blocks that changed them. Whatever happens inside, RNG, autocast, flags, buffers and parameters of the surrounding
program are back as they were when a re-evaluation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from ..devices import is_capturing
from .capture import draws_are_replayable


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


class Slot(NamedTuple):
    """A place in a module that holds a parameter or a buffer."""

    owner: dict[str, Any]
    name: str

    def get(self) -> Tensor | None:
        return self.owner[self.name] if self.name in self.owner else None  # noqa: SIM401 (TorchScript's dict has no get)


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Modules see `tensors` in these slots; what stood there is put back, whatever happens."""
    before = [slot.get() for slot in slots]
    try:
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.owner[slot.name] = tensor
        yield
    finally:
        for slot, tensor in zip(slots, before, strict=True):
            slot.owner[slot.name] = tensor


def buffer_slots(module: nn.Module) -> list[Slot]:
    return [Slot(module._buffers, name) for name in module._buffers]


@contextmanager
def buffers_untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules work on copies of their buffers."""
    slots = [slot for module in modules for slot in buffer_slots(module)]
    copies = [None if buffer is None else buffer.clone() for buffer in (slot.get() for slot in slots)]
    with swapped(slots, copies):
        yield


class _Autocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device_type: str) -> _Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def replay(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@contextmanager
def caches_off() -> Iterator[None]:
    """Neither autocast nor `parametrize.cached` hands a tensor made without gradients to a later use that needs them,
    nor a tensor with another graph to this one."""
    before = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
    torch.set_autocast_cache_enabled(False)
    if before[1]:
        parametrize._cache_enabled = 0
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before[0])
        if before[1]:
            parametrize._cache_enabled = before[1]


class _Rng:
    """The generators that a block can draw from: the CPU's, and that of the state's device."""

    def __init__(self, device: torch.device) -> None:
        self.device = None if device.type in ("cpu", "meta") else device

    def states(self) -> tuple[Tensor, ...]:
        if self.device is None or is_capturing():
            return (torch.get_rng_state(),)
        return torch.get_rng_state(), torch.get_device_module(self.device).get_rng_state(self.device)

    def restore(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if self.device is not None:
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


# In training these normalise with the statistics of the batch, and only write their running ones.
_WRITE_ONLY = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}


class _Buffer(NamedTuple):
    """A buffer before an evaluation."""

    slot: Slot
    tensor: Tensor | None
    version: int
    copy: Tensor | None
    """Its value; None where there is none, or where the module only writes it."""
    uncounted: bool
    """It may be written without a new version: torch's normalisation kernels write running statistics like that."""

    @classmethod
    def of(cls, slot: Slot, module: nn.Module) -> _Buffer:
        tensor = slot.get()
        if tensor is None:
            return cls(slot, None, 0, None, False)
        write_only = module.training and type(module).forward in _WRITE_ONLY
        uncounted = module.training and tensor.is_floating_point() and tensor.ndim == 1
        return cls(slot, tensor, tensor._version, None if write_only else tensor.clone(), uncounted)

    def written(self) -> bool:
        """Whether an evaluation since then may have written it."""
        now = self.slot.get()
        return self.uncounted or now is not self.tensor or (now is not None and now._version != self.version)

    def without_copy(self) -> _Buffer:
        return self._replace(copy=None)

    def scratch(self) -> Tensor | None:
        """A tensor with the value it had, for a re-evaluation to write."""
        if self.copy is not None:
            return self.copy.clone()
        return None if self.tensor is None else self.tensor.clone()

    def unchanged(self) -> Tensor | None:
        """The tensor itself, for a re-evaluation to read."""
        if self.tensor is not None and self.tensor.is_floating_point() and self.tensor._version != self.version:
            raise RuntimeError(
                f"ResidualStack: between forward and backward a block's buffers must not be modified, but "
                f"{self.slot.name!r} of shape {list(self.tensor.shape)} was; modify it after backward"
            )
        return self.tensor


class Replayed:
    """A block's evaluation: the first call runs it and records how; every later call runs it in the same way.

    Args:
        modules: the block and all modules inside it.
        device: of the state; its random generator is replayed beside the CPU's.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.modules = modules
        self.rng = _Rng(device)
        self.device_types = {device.type, "cpu"} - {"meta"}
        self.recorded = False
        self.training: list[bool] = []
        self.autocast: list[_Autocast] = []
        self.rng_states: tuple[Tensor, ...] | None = None
        self.written: list[_Buffer] = []
        self.unwritten: list[_Buffer] = []

    def __call__(self, run: Callable[[], Tensor]) -> Tensor:
        with caches_off():
            if not self.recorded:
                return self._record(run)
            with self._as_recorded():
                return run()

    def _record(self, run: Callable[[], Tensor]) -> Tensor:
        self.training = [module.training for module in self.modules]
        self.autocast = [_Autocast.of(device_type) for device_type in self.device_types]
        states = self.rng.states()
        buffers = [_Buffer.of(slot, module) for module in self.modules for slot in buffer_slots(module)]
        with draws_are_replayable():
            out = run()
        if not all(map(torch.equal, states, self.rng.states())):
            self.rng_states = states
        for buffer in buffers:
            if buffer.written():
                self.written.append(buffer)
            else:
                self.unwritten.append(buffer.without_copy())
        self.recorded = True
        return out

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        with ExitStack() as restored:
            if self.rng_states is not None:
                restored.callback(self.rng.restore, self.rng.states())
                self.rng.restore(self.rng_states)
            for autocast in self.autocast:
                if autocast.enabled or torch.is_autocast_enabled(autocast.device_type):
                    restored.enter_context(autocast.replay())
            for module, training in zip(self.modules, self.training, strict=True):
                if module.training != training:
                    restored.callback(setattr, module, "training", module.training)
                    module.training = training
            buffers = [*((b, b.scratch()) for b in self.written), *((b, b.unchanged()) for b in self.unwritten)]
            if buffers:
                restored.enter_context(swapped([b.slot for b, _ in buffers], [tensor for _, tensor in buffers]))
            yield
