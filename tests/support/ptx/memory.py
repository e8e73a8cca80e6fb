"""Global memory of the machine, which is that of CPU tensors."""

import ctypes

import numpy as np

from .faults import FaultError


class GlobalMemory:
    """What the tensors of a launch may be read and written at: from their first value to their last.

    What lies between the rows of a view counts as the view's.
    """

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
        check_alignment(addresses, width, "global")
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


def _span(tensor):
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize


def check_alignment(addresses, width, space):
    if len(addresses) and (addresses % addresses.dtype.type(width)).any():
        raise FaultError(f"an access of {width} bytes of {space} memory is not aligned to them")
