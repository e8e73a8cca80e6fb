"""The memories of the machine: global memory, which is that of CPU tensors, and a program's shared memory."""

import ctypes

import numpy as np

from .faults import FaultError

POISON = 0xFF
"""Bytes of shared memory that nothing was written to: NaN in every format."""

_SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}
"""How many of the bits 7 to 9 of an address are added to the bits 4 to 6, by the mode of a tensor map."""


def swizzled(addresses, mode):
    return addresses ^ (((addresses >> 7) & _SWIZZLES[mode]) << 4)


class GlobalMemory:
    """What the tensors of a launch may be read and written at: no byte before, between or after their values."""

    def __init__(self, tensors):
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        self._starts, self._stops, self._bytes = [], [], []
        for start, stop in spans:
            if self._stops and start < self._stops[-1]:
                self._stops[-1] = max(stop, self._stops[-1])
            else:
                self._starts.append(start)
                self._stops.append(stop)
        for start, stop in zip(self._starts, self._stops, strict=True):
            first = start // 16 * 16
            size = -(-(stop - first) // 16) * 16
            self._bytes.append((first, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(first))))
        self._starts, self._stops = np.array(self._starts, np.uint64), np.array(self._stops, np.uint64)

    def load(self, addresses, count, dtype):
        """`count` neighbouring values from each of the addresses on, [addresses, count]."""
        out = np.empty((len(addresses), count), dtype)
        for chosen, area, first in self._areas(addresses, count * out.itemsize):
            places = (addresses[chosen] - np.uint64(first)).astype(np.int64) // out.itemsize
            out[chosen] = area.view(dtype)[places[:, None] + np.arange(count)]
        return out

    def store(self, addresses, values):
        """Store [addresses, count] values."""
        count = values.shape[1]
        for chosen, area, first in self._areas(addresses, count * values.itemsize):
            places = (addresses[chosen] - np.uint64(first)).astype(np.int64) // values.itemsize
            area.view(values.dtype)[places[:, None] + np.arange(count)] = values[chosen]

    def add(self, addresses, values):
        """Add [addresses, count] values, one after the other where addresses repeat; what was there before."""
        before = self.load(addresses, values.shape[1], values.dtype)
        for chosen, area, first in self._areas(addresses, values.shape[1] * values.itemsize):
            places = (addresses[chosen] - np.uint64(first)).astype(np.int64) // values.itemsize
            np.add.at(area.view(values.dtype), places[:, None] + np.arange(values.shape[1]), values[chosen])
        return before

    def _areas(self, addresses, width):
        """(which addresses, bytes, the first one's address) of each area that is accessed."""
        addresses = np.asarray(addresses, np.uint64)
        _check_alignment(addresses, width, "global")
        if not len(addresses):
            return
        found = np.searchsorted(self._starts, addresses, "right") - 1
        stops = self._stops[found] if len(self._stops) else np.zeros(len(addresses), np.uint64)
        outside = (found < 0) | (addresses + np.uint64(width) > stops)
        if outside.any():
            place = int(addresses[np.argmax(outside)])
            areas = ", ".join(f"{start:#x}-{stop:#x}" for start, stop in zip(self._starts, self._stops, strict=True))
            raise FaultError(f"{width} bytes of global memory at {place:#x} are in none of {areas}")
        for area in np.unique(found):
            first, content = self._bytes[area]
            yield (slice(None) if (found == area).all() else found == area), content, first


class SharedMemory:
    """Shared memory of several programs, [programs, bytes]. Addresses are each program's own, from zero on.

    Where copies are on their way to, nobody may read or write until they have landed.
    """

    def __init__(self, programs, size):
        self.size = size
        self._bytes = np.full((programs, -(-max(size, 1) // 16) * 16), POISON, np.uint8)
        self._expects = np.zeros(self._bytes.shape, np.bool_)
        self._expected = False

    def load(self, addresses, chosen, count, dtype):
        """`count` neighbouring values from each chosen address [programs, ...] on: [chosen, count]."""
        values = self._bytes.view(dtype).reshape(-1)
        places = self._places(addresses, chosen, count, values.itemsize)
        self._check_that_nothing_is_expected(places, values.dtype)
        return values[places]

    def store(self, addresses, chosen, stored):
        """Store [chosen, count] values at the chosen addresses."""
        values = self._bytes.view(stored.dtype).reshape(-1)
        places = self._places(addresses, chosen, stored.shape[1], stored.itemsize)
        self._check_that_nothing_is_expected(places, values.dtype)
        values[places] = stored

    def expect(self, addresses, chosen, count, dtype):
        """Values of a copy that is on its way."""
        values = self._expects.view(dtype).reshape(-1)
        places = self._places(addresses, chosen, count, values.itemsize)
        self._check_that_nothing_is_expected(places, values.dtype)
        values[places] = values.dtype.type(int.from_bytes(b"\1" * values.itemsize, "little"))
        self._expected = True

    def land(self, addresses, chosen, stored):
        """Store values that were expected."""
        values = self._bytes.view(stored.dtype).reshape(-1)
        places = self._places(addresses, chosen, stored.shape[1], stored.itemsize)
        values[places] = stored
        self._expects.view(stored.dtype).reshape(-1)[places] = 0
        self._expected = self._expects.any()

    def of(self, programs):
        """That of some of the programs, as their own from now on."""
        part = SharedMemory(0, self.size)
        part._bytes, part._expects = (np.ascontiguousarray(a[programs]) for a in (self._bytes, self._expects))
        part._expected = part._expects.any()
        return part

    def _check_that_nothing_is_expected(self, places, dtype):
        if self._expected and self._expects.view(dtype).reshape(-1)[places].any():
            raise FaultError("shared memory is used while a copy is on its way to it")

    def _places(self, addresses, chosen, count, itemsize):
        program, *_ = np.nonzero(chosen)
        addresses = np.broadcast_to(addresses, chosen.shape)[chosen].astype(np.int64)
        width = count * itemsize
        _check_alignment(addresses, width, "shared")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + width > self.size):
            raise FaultError(f"{width} bytes of shared memory at {addresses.max():#x} are not within {self.size:#x}")
        first = (program * self._bytes.shape[1] + addresses) // itemsize
        return first[:, None] + np.arange(count)


def _span(tensor):
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize


def _check_alignment(addresses, width, space):
    if len(addresses) and (addresses % addresses.dtype.type(width)).any():
        raise FaultError(f"an access of {width} bytes of {space} memory is not aligned to them")
