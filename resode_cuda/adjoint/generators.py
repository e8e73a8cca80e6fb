"""The random generators that a block can draw from, and replaying what it drew.

They are torch's of the CPU and of the state's device, Python's `random` and NumPy's global one. A `torch.Generator` or
a `numpy.random.Generator` of the block's own is not among them.
"""

from __future__ import annotations

import ctypes
import pickle
import random
import sys
from typing import Any, Protocol

import torch
from torch import Tensor

from ..devices import is_capturing
from .restoration import undo_later


class Generator(Protocol):
    """A source of random numbers."""

    def state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...

    def has_state(self, state: Any) -> bool:
        """Whether nothing was drawn since the state was asked for."""


class Drawn(list[tuple[Generator, Any]]):
    """The generators that a block drew from, each with its state before."""

    def replay(self) -> None:
        """Set these states, until the `restoring` around this ends."""
        for generator, state in self:
            undo_later(generator.set_state, generator.state())
            generator.set_state(state)


class Generators:
    """All of them during one forward pass, whose blocks run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._all: list[Generator] = [_Cpu(), _Python()]
        if device.type not in ("cpu", "meta") and not is_capturing():
            self._all.append(_Device(device))
        if "numpy" in sys.modules:
            self._all.append(_NumPy())
        self._states = [generator.state() for generator in self._all]

    def restore_torchs(self) -> None:
        """Undo what blocks draw of torch's own when the `restoring` around this ends, also where they seed it."""
        for generator in self._all:
            if not isinstance(generator, (_Python, _NumPy)):
                undo_later(_restore, generator, generator.state())

    def restore_later(self) -> None:
        """Give them the states of the beginning when the `restoring` around this ends."""
        for generator, state in zip(self._all, self._states, strict=True):
            undo_later(generator.set_state, state)

    def release(self) -> None:
        """All blocks have run."""
        self._states = []

    def drawn_since_last(self) -> Drawn:
        """What was drawn from since this was last asked, or since the pass began."""
        drawn = self.drawn_so_far()
        for generator, _ in drawn:
            self._states[self._all.index(generator)] = generator.state()
        return drawn

    def drawn_so_far(self) -> Drawn:
        """The same, by a block that is still running."""
        return Drawn(
            (generator, before)
            for generator, before in zip(self._all, self._states, strict=True)
            if not generator.has_state(before)
        )


def _restore(generator: Generator, state: Any) -> None:
    if not generator.has_state(state):
        generator.set_state(state)


class _Cpu:
    def state(self) -> Tensor:
        return torch.get_rng_state()

    def set_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def has_state(self, state: Tensor) -> bool:
        return torch.equal(state, torch.get_rng_state())


class _Device:
    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)

    def state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state(self._device)
        return state

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._device)

    def has_state(self, state: Tensor) -> bool:
        return torch.equal(state, self.state())


class _Python:
    def state(self) -> Any:
        return random.getstate()

    def set_state(self, state: Any) -> None:
        random.setstate(state)

    def has_state(self, state: Any) -> bool:
        # The place in the generator's 624 words, then words that change whenever it makes or is given new ones: to
        # compare all of them would double the cost. The last entry is the spare number of random.gauss.
        now = random.getstate()
        return now[1][-1] == state[1][-1] and now[1][1:4] == state[1][1:4] and now[2] == state[2]


class _NumPy:
    """NumPy's `numpy.random.*` functions; asking for their state takes as long as a small block.

    The bits of the Mersenne twister, their default, are looked at where they lie instead, except while NumPy keeps a
    spare Gaussian number, which is drawn without a change of bits.
    """

    _BYTES = 624 * 4 + 4  # the words, and the place in them

    _last: tuple[Any, bytes | None] | None = None
    """The last state that was asked for: while the bits are the same, so is the rest."""

    def __init__(self) -> None:
        self._random = sys.modules["numpy"].random

    def state(self) -> tuple[Any, bytes | None]:
        bits, last = self._bits(), _NumPy._last
        if last is not None and bits is not None and bits == last[1]:
            return last
        whole = self._random.get_state(legacy=False)
        state = whole, None if whole["has_gauss"] else bits
        _NumPy._last = state
        return state

    def set_state(self, state: tuple[Any, bytes | None]) -> None:
        self._random.set_state(state[0])

    def has_state(self, state: tuple[Any, bytes | None]) -> bool:
        whole, bits = state
        if bits is not None:
            return self._bits() == bits
        return pickle.dumps(self._random.get_state(legacy=False)) == pickle.dumps(whole)

    def _bits(self) -> bytes | None:
        if not hasattr(self._random, "get_bit_generator"):
            return None
        generator = self._random.get_bit_generator()
        if type(generator).__name__ != "MT19937":
            return None
        return ctypes.string_at(generator.ctypes.state_address, self._BYTES)
