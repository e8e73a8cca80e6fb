"""Copies that go on while a program does: by its threads (cp.async), and of tiles by the copy engine.

At once they land where they are asked for; late only where they are waited for, when they read their source too, so
that whoever overwrites it in between is found out.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .assembly import address
from .faults import Fault, UnknownInstructionError
from .state import MAP_BYTES, MAPS, reader, writer

SWIZZLE_MASKS = {0: 0, 1: 1, 2: 3, 3: 7}
"""How many of the bits 7 to 9 of an address are added to the bits 4 to 6, by the mode of a tensor map."""


def swizzled(addresses, mode):
    return addresses ^ (((addresses >> 7) & SWIZZLE_MASKS[mode]) << 4)


class ThreadCopies:
    """cp.async of a batch: each thread's copies, in groups."""

    def __init__(self, batch):
        self.batch = batch
        self.groups = np.zeros(batch.shape, np.int64)
        self.pending = []

    def of(self, batch, programs):
        part = object.__new__(ThreadCopies)
        part.batch, part.groups = batch, self.groups[programs]
        part.pending = [tuple(v[programs] if isinstance(v, np.ndarray) else v for v in copy) for copy in self.pending]
        return part

    def ask(self, chosen, target, source, sizes, width):
        copy = (np.where(chosen, self.groups, -1), target, source, sizes, width)
        if self.batch.launch.late:
            self.pending.append(copy)
        else:
            self._land(copy, chosen)

    def commit(self, mask):
        self.groups = self.groups + self.batch.everywhere(mask)

    def wait(self, mask, allowed):
        """Wait until no more than so many of the newest groups are on their way."""
        waiting = []
        for copy in self.pending:
            group = copy[0]
            done = (group >= 0) & (group < self.groups - allowed) & self.batch.everywhere(mask)
            self._land(copy, done)
            left = np.where(done, -1, group)
            if (left >= 0).any():
                waiting.append((left, *copy[1:]))
        self.pending = waiting

    def _land(self, copy, chosen):
        _, target, source, sizes, width = copy
        nothing = chosen & (sizes == 0)
        whole = chosen & (sizes == width)
        if (chosen & ~nothing & ~whole).any():
            raise UnknownInstructionError("cp.async that fills up a part with zeros")
        zeros = np.zeros((np.count_nonzero(nothing), width), np.uint8)
        self.batch.shared.store(target, nothing, _in_words(zeros))
        found = self.batch.launch.memory.load(source[whole], width // 4, np.uint32)
        self.batch.shared.store(target, whole, found)


def _in_words(content):
    return np.ascontiguousarray(content).view(np.uint32)


class TensorMap:
    """A tensor of two dimensions as the copy engine knows it: a box of it, and how that lies in shared memory."""

    def __init__(self, tensor, box, swizzle):
        self.start, self.strides, self.shape = tensor.data_ptr(), tensor.stride(), tuple(tensor.shape)
        self.itemsize, self.box, self.swizzle = tensor.itemsize, tuple(box), swizzle
        if len(self.shape) != 2 or self.strides[1] != 1:
            raise UnknownInstructionError("a tensor map that is not of rows")
        if self.start % 16 or self.strides[0] * self.itemsize % 16:
            raise Fault(f"a tensor map's start and rows must be aligned to 16 bytes, got {self.start:#x}, {self.strides}")

    @property
    def bytes(self):
        return self.box[0] * self.box[1] * self.itemsize

    def places(self, corner, shared):
        """(addresses in global memory, in shared memory, which of them are within the tensor), each [rows, columns]."""
        row, column = np.meshgrid(*map(np.arange, self.box), indexing="ij")
        if shared % 128:
            raise Fault(f"the copy engine needs shared memory aligned to 128 bytes, got {shared:#x}")
        here = swizzled(shared + (row * self.box[1] + column) * self.itemsize, self.swizzle)
        row, column = row + corner[1], column + corner[0]
        inside = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        there = self.start + (row * self.strides[0] + column) * self.itemsize
        return there.astype(np.uint64), here, inside


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still lacks, and the parity of the phase."""

    def __init__(self, count):
        self.count, self.arrivals, self.bytes, self.parity = count, count, 0, 0
        self.pending = []

    def check(self):
        if self.arrivals == 0 and self.bytes == 0:
            self.parity ^= 1
            self.arrivals = self.count


@dataclass
class Stores:
    """A thread's stores of tiles: those that were asked for, and the groups that they were put into."""

    asked: list = field(default_factory=list)
    groups: list = field(default_factory=list)


class EngineCopies:
    """The copies of tiles that a batch's programs have asked the copy engine for."""

    def __init__(self, batch):
        self.batch = batch
        self.barriers = [{} for _ in batch.places]
        self.stores = [defaultdict(Stores) for _ in batch.places]

    def of(self, batch, programs):
        part = object.__new__(EngineCopies)
        part.batch = batch
        chosen = np.flatnonzero(programs)
        part.barriers, part.stores = ([content[i] for i in chosen] for content in (self.barriers, self.stores))
        return part

    def barrier(self, program, place):
        if place not in self.barriers[program]:
            raise Fault(f"there is no barrier at {place:#x}")
        return self.barriers[program][place]

    def start_barrier(self, program, place, count):
        if place % 8 or place + 8 > self.batch.shared.size:
            raise Fault(f"a barrier must be aligned to 8 bytes within shared memory, got {place:#x}")
        if place in self.barriers[program]:
            raise Fault(f"the barrier at {place:#x} is in use")
        self.barriers[program][place] = Barrier(count)

    def load(self, program, tensor_map, corner, shared, place):
        barrier = self.barrier(program, place)
        barrier.pending.append((tensor_map, corner, shared))
        if not self.batch.launch.late:
            self._land(program, barrier)

    def arrive(self, program, place, expected):
        barrier = self.barrier(program, place)
        barrier.bytes += expected
        barrier.arrivals -= 1
        barrier.check()

    def has_ended(self, program, place, parity):
        """Whether the barrier's phase of this parity has."""
        barrier = self.barrier(program, place)
        self._land(program, barrier)
        if barrier.parity == parity:
            raise Fault(
                f"waits for ever at the barrier {place:#x}: it lacks {barrier.arrivals} arrivals and {barrier.bytes} bytes"
            )
        return True

    def store(self, program, thread, tensor_map, corner, shared, adds):
        self.stores[program][thread].asked.append((tensor_map, corner, shared, adds))
        if not self.batch.launch.late:
            self._end(program, thread)

    def commit_stores(self, program, thread):
        stores = self.stores[program][thread]
        stores.groups.append(stores.asked)
        stores.asked = []

    def wait_for_stores(self, program, thread, allowed):
        """Wait until no more than so many of the newest groups are on their way."""
        groups = self.stores[program][thread].groups
        while len(groups) > allowed:
            self._store(program, groups.pop(0))

    def end(self):
        """What nobody waits for is done before a launch ends."""
        for program, by_thread in enumerate(self.stores):
            for thread in by_thread:
                self._end(program, thread)

    def _end(self, program, thread):
        self.wait_for_stores(program, thread, 0)
        stores = self.stores[program][thread]
        self._store(program, stores.asked)
        stores.asked = []

    def _land(self, program, barrier):
        while barrier.pending:
            tensor_map, corner, shared = barrier.pending.pop(0)
            there, here, inside = tensor_map.places(corner, shared)
            unsigned = np.dtype(f"u{tensor_map.itemsize}")
            values = np.zeros((here.size, 1), unsigned)
            values[inside.reshape(-1)] = self.batch.launch.memory.load(there[inside], 1, unsigned)
            self.batch.shared.store(*self._of_program(program, here), values)
            barrier.bytes -= tensor_map.bytes
            barrier.check()

    def _store(self, program, group):
        for tensor_map, corner, shared, adds in group:
            there, here, inside = tensor_map.places(corner, shared)
            if tensor_map.itemsize != 4:
                raise UnknownInstructionError("stores of tiles that are not of 32 bits")
            values = self.batch.shared.load(*self._of_program(program, here), 1, np.float32)[inside.reshape(-1)]
            memory = self.batch.launch.memory
            (memory.add if adds else memory.store)(there[inside], values)

    def _of_program(self, program, places):
        """The places, and the mask, of this program alone."""
        chosen = np.zeros((len(self.batch.places), places.size), np.bool_)
        chosen[program] = True
        return places.reshape(1, -1), chosen


def decode(instruction, program):
    """The instruction's function of a batch and a mask; None if it is no copy, nor a barrier of copies."""
    name = instruction.name
    if name.startswith(("cp.async.ca.shared.global", "cp.async.cg.shared.global")):
        return _thread_copy(instruction, program)
    if name == "cp.async.commit_group":
        return lambda batch, mask: batch.engine(ThreadCopies).commit(mask)
    if name == "cp.async.wait_group":
        allowed = int(instruction.operands[0], 0)
        return lambda batch, mask: batch.engine(ThreadCopies).wait(mask, allowed)
    if name.startswith("mbarrier."):
        return _barrier_operation(instruction, program)
    if name.startswith("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier"):
        return _tile_load(instruction, program)
    if name.startswith(("cp.reduce.async.bulk.tensor.2d.global.shared", "cp.async.bulk.tensor.2d.global.shared")):
        return _tile_store(instruction, program)
    if name.startswith("cp.async.bulk.commit_group"):
        return _for_each_thread(lambda batch, *one: batch.engine(EngineCopies).commit_stores(*one))
    if name.startswith("cp.async.bulk.wait_group"):
        allowed = int(instruction.operands[0], 0)
        return _for_each_thread(lambda batch, *one: batch.engine(EngineCopies).wait_for_stores(*one, allowed))
    return None


def shared_places(instruction, program, operand):
    """A function of a batch: the addresses in shared memory."""
    base, offset = address(operand)
    read = reader(program, base, "s32")
    return lambda batch: np.broadcast_to(read(batch).astype(np.int64) + offset, batch.shape)


def global_places(instruction, program, operand):
    """A function of a batch: the addresses in global memory."""
    base, offset = address(operand)
    read = reader(program, base, "s64")
    return lambda batch: np.broadcast_to(read(batch) + np.int64(offset), batch.shape).view(np.uint64)


def _thread_copy(instruction, program):
    target, source, width, *size = instruction.operands
    target, source = shared_places(instruction, program, target), global_places(instruction, program, source)
    width = int(width, 0)
    size = reader(program, size[0], "u32") if size else (lambda batch: np.uint32(width))

    def copy(batch, mask):
        sizes = np.broadcast_to(size(batch), batch.shape).astype(np.int64)
        batch.engine(ThreadCopies).ask(batch.everywhere(mask), target(batch), source(batch), sizes, width)

    return copy


def _each_thread(batch, mask):
    return zip(*map(np.ndarray.tolist, np.nonzero(batch.everywhere(mask))), strict=True)


def _for_each_thread(function):
    def step(batch, mask):
        for program, by_thread in enumerate(batch.engine(EngineCopies).stores):
            for thread in list(by_thread):
                if mask is None or mask[program, thread]:
                    function(batch, program, thread)

    return step


def _barrier_operation(instruction, program):
    kind = instruction.parts[1]
    operands = [operand for operand in instruction.operands if operand.startswith("[")]
    place = shared_places(instruction, program, operands[0])
    more = reader(program, instruction.operands[-1], "u32") if kind in ("init", "arrive", "try_wait") else None
    if kind == "try_wait":
        write = writer(program, instruction.operands[0], "pred")

    def step(batch, mask):
        engine, places = batch.engine(EngineCopies), place(batch)
        values = None if more is None else np.broadcast_to(more(batch), batch.shape)
        if kind == "try_wait":
            for one in range(len(batch.places)):
                if (places[one] != places[one, 0]).any() or (values[one] != values[one, 0]).any():
                    raise UnknownInstructionError("threads of a program that wait at different barriers")
                engine.has_ended(one, int(places[one, 0]), int(values[one, 0]) & 1)
            write(batch, mask, np.bool_(True))
            return
        for one, thread in _each_thread(batch, mask):
            at = int(places[one, thread])
            if kind == "init":
                engine.start_barrier(one, at, int(values[one, thread]))
            elif kind == "inval":
                engine.barrier(one, at)
                del engine.barriers[one][at]
            elif kind == "arrive" and instruction.has("expect_tx"):
                engine.arrive(one, at, int(values[one, thread]))
            else:
                raise UnknownInstructionError(f"no meaning of {instruction}")

    return step


def _tile(instruction, program, operand):
    """A function of a batch and a thread: (the tensor map, the corner of the box)."""
    name, corner = re.fullmatch(r"\[\s*(\S+),\s*\{(.*)\}\s*\]", operand).groups()
    which = reader(program, name, "u64")
    corner = [reader(program, part.strip(), "s32") for part in corner.split(",")]

    def found(batch, *thread):
        number = (int(np.broadcast_to(which(batch), batch.shape)[thread]) - MAPS) // MAP_BYTES
        return batch.launch.maps[number], [int(np.broadcast_to(c(batch), batch.shape)[thread]) for c in corner]

    return found


def _tile_load(instruction, program):
    shared, tile, barrier = instruction.operands
    shared, barrier = (shared_places(instruction, program, operand) for operand in (shared, barrier))
    tile = _tile(instruction, program, tile)

    def load(batch, mask):
        for one in _each_thread(batch, mask):
            places = int(shared(batch)[one]), int(barrier(batch)[one])
            batch.engine(EngineCopies).load(one[0], *tile(batch, *one), *places)

    return load


def _tile_store(instruction, program):
    tile, shared = instruction.operands
    tile, shared = _tile(instruction, program, tile), shared_places(instruction, program, shared)
    adds = instruction.parts[1] == "reduce"
    if adds and not instruction.has("add"):
        raise UnknownInstructionError(f"no meaning of {instruction}")

    def store(batch, mask):
        for one in _each_thread(batch, mask):
            batch.engine(EngineCopies).store(*one, *tile(batch, *one), int(shared(batch)[one]), adds)

    return store
