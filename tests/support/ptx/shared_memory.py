"""Shared memory of the machine's programs, and who is at odds over it.

Whoever writes a byte and whoever else reads or writes it must have met at a barrier in between, so that in what order
they go does not matter. In lockstep a race would not show in results; here it is a fault. Copies count as their
threads' accesses where they are asked for and where they land, products as those of a warpgroup's matrix unit, which
also needs a fence after what threads have stored.
"""

import numpy as np

from .faults import FaultError
from .memory import check_alignment

POISON = 0xFF
"""Bytes of shared memory that nothing was written to: NaN in every format."""

_SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}
"""How many of the bits 7 to 9 of an address are added to the bits 4 to 6, by the mode of a tensor map."""


def swizzled(addresses, mode):
    return addresses ^ (((addresses >> 7) & _SWIZZLES[mode]) << 4)


MATRIX_UNITS = 32
"""The first warpgroup's matrix unit, among those who access memory: before it come the warps."""
_SEVERAL, _MOST = 63, 64
_NOBODY = -_MOST


class SharedMemory:
    """Shared memory of several programs, [programs, bytes]. Addresses are each program's own, from zero on.

    Args of its methods: addresses [programs, ...] and which of them are chosen; by: who accesses the chosen ones, or
    the warps of a program, each of which has as many of the addresses.
    """

    def __init__(self, programs, size, threads):
        self.size, self._warps, self._epoch = size, threads // 32, 0
        shape = programs, -(-max(size, 1) // 16) * 16
        self._bytes = np.full(shape, POISON, np.uint8)
        # Who has read and written each byte last, and since which barrier.
        self._readers, self._writers = np.full(shape, _NOBODY, np.int32), np.full(shape, _NOBODY, np.int32)
        self._is_unfenced = np.zeros(shape, np.bool_)
        # Bytes that copies are on their way to: nobody may use them until these have landed.
        self._is_expected, self._expects = np.zeros(shape, np.bool_), False

    def load(self, addresses, chosen, count, dtype, by=None):
        """`count` neighbouring values from each chosen address on: [chosen, count]."""
        dtype = np.dtype(dtype)
        places, each = self._places(addresses, chosen, count, dtype.itemsize)
        who = self._who(chosen, by)
        if by is not None and self._is_unfenced.reshape(-1)[each].any():
            raise FaultError("what threads have stored is read by the hardware without a fence in between")
        self._read(each, who)
        return self._bytes.view(dtype).reshape(-1)[places]

    def store(self, addresses, chosen, stored):
        """Store [chosen, count] values at the chosen addresses."""
        places, each = self._places(addresses, chosen, stored.shape[1], stored.itemsize)
        who, values = self._who(chosen, None), self._bytes.view(stored.dtype).reshape(-1)
        is_new = np.repeat(values[places] != stored, stored.itemsize, 1)
        self._check_that_it_may_be_written(each, who, is_new)
        self._write(each, who)
        self._is_unfenced.reshape(-1)[each] = True
        values[places] = stored
        if (values[places] != stored).any():
            raise FaultError("several warps write to one place at once")

    def expect(self, addresses, chosen, count, dtype, by=None):
        """A copy is on its way to the chosen addresses."""
        _, each = self._places(addresses, chosen, count, np.dtype(dtype).itemsize)
        self._check_that_it_may_be_written(each, self._who(chosen, by), is_new=True)
        self._is_expected.reshape(-1)[each] = True
        self._expects = True

    def land(self, addresses, chosen, stored, is_seen_by_all):
        """Store values that were expected, and are seen by those who waited: a copy's own threads, or all."""
        self._expects = False
        places, each = self._places(addresses, chosen, stored.shape[1], stored.itemsize)
        self._bytes.view(stored.dtype).reshape(-1)[places] = stored
        self._is_expected.reshape(-1)[each] = False
        self._expects = self._is_expected.any()
        if is_seen_by_all:
            self._writers.reshape(-1)[each] = _NOBODY
        else:
            self._write(each, self._who(chosen, None))
            # Not unfenced: Triton has products read what cp.async has brought after its wait and a barrier, in all of
            # its kernels for Hopper that load by pointer. The PTX ISA does not say of which proxy such a copy is.

    def meet(self):
        """All threads have come to a barrier."""
        self._epoch += 1

    def fence(self):
        """What threads have stored may be read by the hardware."""
        self._is_unfenced[:] = False

    def of(self, programs):
        """That of some of the programs, as their own from now on."""
        part = object.__new__(SharedMemory)
        vars(part).update(vars(self))
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(part, name, np.ascontiguousarray(value[programs]))
        part._expects = part._is_expected.any()
        return part

    def _who(self, chosen, by):
        if by is not None:
            return np.broadcast_to(by, chosen.shape)[chosen][:, None]
        return (np.nonzero(chosen)[1] * self._warps // chosen.shape[1])[:, None]

    def _read(self, each, who):
        readers, writers, mine = self._readers.reshape(-1), self._writers.reshape(-1), self._epoch * _MOST + who
        self._check_since_the_barrier(writers[each], lambda other: other != who, "read what another has just written")
        before = readers[each]
        with_others = (before // _MOST == self._epoch) & (before != mine)
        now = np.where(with_others, self._epoch * _MOST + _SEVERAL, mine)
        readers[each] = now
        readers[each[readers[each] != now]] = self._epoch * _MOST + _SEVERAL

    def _check_that_it_may_be_written(self, each, who, is_new):
        def other_than(reader):
            # A matrix unit is done when its warps go on.
            return (reader != who) & ((reader == _SEVERAL) | (reader - MATRIX_UNITS != who // 4))

        self._check_since_the_barrier(self._readers.reshape(-1)[each], other_than, "write what another has just read")
        # Warps that compute the same may write the same.
        writers = self._writers.reshape(-1)[each]
        self._check_since_the_barrier(writers, lambda o: is_new & (o != who), "write what another has just written")

    def _check_since_the_barrier(self, stamps, is_other, what):
        found = (stamps // _MOST == self._epoch) & is_other(stamps % _MOST)
        if found.any():
            raise FaultError(f"threads {what}, without a barrier in between")

    def _write(self, each, who):
        writers, mine = self._writers.reshape(-1), self._epoch * _MOST + who
        writers[each] = mine
        writers[each[writers[each] != mine]] = self._epoch * _MOST + _SEVERAL

    def _places(self, addresses, chosen, count, itemsize):
        """(places of the values among all of that size, of their bytes among all bytes), [chosen, ...]."""
        program, *_ = np.nonzero(chosen)
        addresses = np.broadcast_to(addresses, chosen.shape)[chosen].astype(np.int64)
        width = count * itemsize
        check_alignment(addresses, width, "shared")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + width > self.size):
            raise FaultError(f"{width} bytes of shared memory at {addresses.max():#x} are not within {self.size:#x}")
        first = program * self._bytes.shape[1] + addresses
        each = first[:, None] + np.arange(width)
        if self._expects and self._is_expected.reshape(-1)[each].any():
            raise FaultError("shared memory is used while a copy is on its way to it")
        return first[:, None] // itemsize + np.arange(count), each
