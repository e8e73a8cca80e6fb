"""The random generators that a block can draw from, and replaying what it drew.

They are torch's of the CPU and of the state's device, Python's `random` and NumPy's global one. A `torch.Generator` or
a `numpy.random.Generator` of the block's own is not among them.
"""

from __future__ import annotations

import ctypes
import pickle
import random
import struct
import sys
from functools import lru_cache
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

    def rewind(self) -> None:
        """Give them the states that they had when the block that is running began."""
        for generator, state in zip(self._all, self._states, strict=True):
            _restore(generator, state)

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
    """Python's `random`, whose functions are methods of one Mersenne twister.

    It tells its state as a tuple of 625 numbers, which takes as long as a small block. CPython's bits are looked at
    where they lie instead.
    """

    def state(self) -> Any:
        if _PYTHONS is None:
            return random.getstate()
        return _PYTHONS.raw, random._inst.gauss_next  # type: ignore[attr-defined]

    def set_state(self, state: Any) -> None:
        if isinstance(state[0], bytes):
            state = random.Random.VERSION, _words(state[0]), state[1]
        random.setstate(state)

    def has_state(self, state: Any) -> bool:
        return bool(self.state() == state)


class _NumPy:
    """NumPy's `numpy.random.*` functions; asking for their state takes as long as a small block.

    The bits of the Mersenne twister, their default, are looked at where they lie instead, except while NumPy keeps a
    spare Gaussian number, which is drawn without a change of bits.
    """

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
        view = _numpys_bits(self._random.get_bit_generator())
        return None if view is None else view.raw


@lru_cache(maxsize=1)
def _numpys_bits(generator: Any) -> Any:
    """The memory of a Mersenne twister of NumPy's; None for another generator."""
    is_twister = type(generator).__name__ == "MT19937"
    return (ctypes.c_char * _TWISTER.size).from_address(generator.ctypes.state_address) if is_twister else None


_TWISTER = struct.Struct("=625I")
"""A Mersenne twister: its 624 words, and the place in them. CPython has the place first, NumPy last."""


def _words(bits: bytes) -> tuple[int, ...]:
    """CPython's bits as `random.getstate` gives them."""
    place, *words = _TWISTER.unpack(bits)
    return *words, place


def _pythons_bits() -> Any:
    """The memory of the generator of Python's `random`; None where its bits don't lie there as expected."""
    generator = random._inst
    header = object.__basicsize__
    if sys.implementation.name != "cpython" or type(generator).__basicsize__ < header + _TWISTER.size:
        return None
    bits = (ctypes.c_char * _TWISTER.size).from_address(id(generator) + header)
    return bits if _words(bits.raw) == random.getstate()[1] else None


_PYTHONS = _pythons_bits()
