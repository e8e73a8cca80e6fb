"""The state of programs that go in lockstep, and how instructions read and write it."""

import numpy as np

from .arithmetic import NUMBERS
from .assembly import address
from .faults import FaultError, UnknownInstructionError
from .shared_memory import SharedMemory

WARP = 32
"""Threads of a warp."""
MAPS = 1 << 60
"""Address of the first tensor map among a kernel's parameters, where no memory is."""
MAP_BYTES = 128
POISONED = 2**64 - 1
"""Bits of what has no value: NaN in every format."""


class Batch:
    """Some programs of a launch: registers [programs, threads] and shared memory, and what is still on its way.

    A register without a value is None: nothing was written to it, or a product is still to be added. `at` is the place
    in the code. Where threads have taken different branches, `active` are those that are there, and `parted` tells, for
    each of the branches, where they meet again, who took it, and who is still to go the other way, from where.
    """

    def __init__(self, program, launch, places):
        self.program, self.launch, self.places = program, launch, places
        self.threads = program.threads
        self.registers = [None] * len(program.registers)
        self.shared = SharedMemory(len(places), launch.shared_bytes, program.threads)
        self.at, self.active, self.parted = 0, None, []
        self.engines = [engine(self) for engine in launch.engines]

    @property
    def shape(self):
        return len(self.places), self.threads

    def of(self, programs):
        """The state of some of the programs, which go on by themselves."""
        part = object.__new__(Batch)
        vars(part).update(vars(self))
        part.places = [place for place, is_there in zip(self.places, programs, strict=True) if is_there]
        part.registers = [None if value is None else value[programs] for value in self.registers]
        part.shared = self.shared.of(programs)
        part.engines = [engine.of(part, programs) for engine in self.engines]
        return part

    def branch(self, mask, target, meeting_place):
        """Some of the active threads go to the target, the others on, one after the other, until they meet."""
        active = self.everywhere(self.active)
        self.parted.append((meeting_place, self.active, (target, active & mask)))
        self.active = active & ~mask

    def meet(self):
        """Go on with the other threads if they still have to come here, or else with all."""
        while self.parted and self.parted[-1][0] == self.at:
            meeting_place, everyone, others = self.parted.pop()
            if others is None:
                self.active = everyone
            else:
                self.parted.append((meeting_place, everyone, None))
                self.at, self.active = others

    def count_ended(self, count):
        """Something that was on its way has ended at the instruction that is executed."""
        self.launch.ended[self.at - 1] += count

    def engine(self, kind):
        return next(engine for engine in self.engines if isinstance(engine, kind))

    def everywhere(self, mask):
        """The mask, or all threads."""
        return np.ones(self.shape, np.bool_) if mask is None else mask


def reader(program, operand, type_):
    """A function of a batch: the operand, taken for a type; an array, or one value for all."""
    number = np.dtype(NUMBERS[type_])
    if operand in program.registers and operand not in program.written:
        # The compiler's way to say that any value will do, such as of a byte that nobody looks at.
        return lambda batch: np.array(POISONED, np.uint64).astype(f"u{number.itemsize}").view(number)[()]
    if operand in program.registers:
        place, held = program.registers[operand]
        narrower = number.itemsize < np.dtype(held).itemsize
        if number.itemsize > np.dtype(held).itemsize:
            raise UnknownInstructionError(f"{operand} is narrower than {type_}")
        cut = np.dtype(f"u{number.itemsize}")

        def from_register(batch):
            value = batch.registers[place]
            if value is None:
                raise FaultError(f"{operand} is read before it has a value")
            if narrower:
                value = value.astype(cut)
            return value if value.dtype == number else value.view(number)

        return from_register
    if operand.startswith("%"):
        return _special(operand, number)
    if operand == "global_smem":
        bits = 0
    elif operand in program.parameters:
        bits = MAPS + MAP_BYTES * program.parameters.index(operand)
    elif operand[:2].lower() in ("0f", "0d"):
        bits = int(operand[2:], 16)
    else:
        bits = int(operand.rstrip("U"), 0)
    if number == np.bool_:
        constant = np.bool_(bits != 0)
    else:
        unsigned = np.dtype(f"u{number.itemsize}")
        constant = np.array(bits & (2 ** (8 * number.itemsize) - 1), unsigned).view(number)[()]
    return lambda batch: constant


def _special(name, number):
    kind, _, axis = name[1:].partition(".")
    axis = "xyz".find(axis)

    def value(batch):
        if kind == "tid":
            return np.broadcast_to(np.arange(batch.threads) * (axis == 0), batch.shape).astype(number)
        if kind == "ctaid":
            return np.broadcast_to(np.array([[place[axis]] for place in batch.places]), batch.shape).astype(number)
        if kind == "nctaid":
            return np.full(batch.shape, batch.launch.grid[axis], number)
        raise UnknownInstructionError(f"no meaning of {name}")

    return value


def writer(program, operand, type_):
    """A function of a batch, a mask and what is to be written to the operand."""
    if operand == "_":
        return lambda batch, mask, value: None
    place, held = program.registers[operand]
    held = np.dtype(held)

    def to_register(batch, mask, value):
        value = np.asarray(value)
        if value.dtype.itemsize < held.itemsize:
            # Registers that are wider than what is written are filled up with its sign.
            value = value.astype(np.dtype(f"i{held.itemsize}") if value.dtype.kind == "i" else held)
        value = np.array(np.broadcast_to(value, batch.shape)) if value.shape != batch.shape else value
        value = value if value.dtype == held else np.ascontiguousarray(value).view(held)
        if mask is not None:
            before = batch.registers[place]
            value = np.where(mask, value, np.array(POISONED, np.uint64).astype(held) if before is None else before)
        batch.registers[place] = value

    return to_register


def shared_places(program, operand):
    """A function of a batch: the addresses in shared memory."""
    base, offset = address(operand)
    read = reader(program, base, "s32")
    return lambda batch: np.broadcast_to(read(batch).astype(np.int64) + offset, batch.shape)


def global_places(program, operand):
    """A function of a batch: the addresses in global memory."""
    base, offset = address(operand)
    read = reader(program, base, "s64")
    return lambda batch: np.broadcast_to(read(batch) + np.int64(offset), batch.shape).view(np.uint64)
