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
        return self.owner.get(self.name)


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
        # The weight cache must stay out of it: a cast that it took without gradients would be handed to an evaluation
        # that needs them, which then loses the weight's gradient in silence.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Rng:
    """The generators that a block can draw from: the CPU's, and that of the state's device."""

    def __init__(self, device: torch.device) -> None:
        self.device = None if device.type in ("cpu", "meta") else device

    def states(self) -> tuple[Tensor, ...]:
        if self.device is None:
            return (torch.get_rng_state(),)
        return torch.get_rng_state(), torch.get_device_module(self.device).get_rng_state(self.device)

    def restore(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if self.device is not None:
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


# In training these normalise with the statistics of the batch, and only write their running ones.
_WRITE_ONLY = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}


class _Before(NamedTuple):
    """A buffer that an evaluation may have written, and what it held before."""

    slot: Slot
    value: Tensor | None
    kept: bool
    """Whether `value` is that; else the evaluation's result does not depend on it."""
    unread: bool
    """Whether nothing in the module reads the buffer at all, its dtype aside."""

    def scratch(self) -> Tensor | None:
        """A tensor for a re-evaluation to work on."""
        if self.kept:
            return None if self.value is None else self.value.clone()
        buffer = self.slot.owner[self.slot.name]
        # Modules divide by their integer counters, so those need a value that makes sense.
        return torch.empty_like(buffer) if self.unread and buffer.is_floating_point() else buffer.clone()


class _BufferLog:
    """Buffers as they stand before an evaluation, to tell afterwards which of them it wrote."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.entries: list[tuple[Tensor | None, int, bool, _Before]] = []
        for module in modules:
            if not module._buffers:
                continue
            unread = module.training and type(module).forward in _WRITE_ONLY
            for slot in buffer_slots(module):
                buffer = slot.get()
                # torch's normalisation kernels write running statistics without counting a new version.
                uncounted = module.training and buffer is not None and buffer.is_floating_point() and buffer.ndim == 1
                copy = None if unread or buffer is None else buffer.clone()
                self.entries.append((buffer, _version(buffer), uncounted, _Before(slot, copy, not unread, unread)))

    def written(self) -> list[_Before]:
        found = []
        for buffer, version, uncounted, before in self.entries:
            if before.slot.get() is not buffer or _version(buffer) != version:
                found.append(before)
            elif uncounted:
                found.append(before._replace(value=None, kept=False))
        return found


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor._version


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
        self.buffers: list[_Before] = []

    def __call__(self, run: Callable[[], Tensor]) -> Tensor:
        if self.recorded:
            with self._as_recorded():
                return run()
        return self._record(run)

    def _record(self, run: Callable[[], Tensor]) -> Tensor:
        self.training = [module.training for module in self.modules]
        self.autocast = [_Autocast.of(device_type) for device_type in self.device_types]
        states = self.rng.states()
        buffers = _BufferLog(self.modules)
        with autocast_cache_off():
            out = run()
        if not all(map(torch.equal, states, self.rng.states())):
            self.rng_states = states
        self.buffers = buffers.written()
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
            if self.buffers:
                slots = [before.slot for before in self.buffers]
                restored.enter_context(swapped(slots, [before.scratch() for before in self.buffers]))
            yield
