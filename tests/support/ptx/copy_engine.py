"""Copies of tiles by the copy engine, and the barriers that tell when they have landed.

As those of threads they land at once, or late: loads one after the other where their barrier is waited for, stores and
additions where it is waited until their source has been read.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .faults import FaultError, UnknownInstructionError
from .shared_memory import swizzled
from .state import MAP_BYTES, MAPS, WARP, reader, shared_places, writer


class TensorMap:
    """A tensor of two dimensions as the copy engine knows it: a box of it, and how that lies in shared memory."""

    def __init__(self, tensor, box, swizzle):
        self.start, self.strides, self.shape = tensor.data_ptr(), tensor.stride(), tuple(tensor.shape)
        self.itemsize, self.box, self.swizzle = tensor.itemsize, tuple(box), swizzle
        self.unsigned = np.dtype(f"u{self.itemsize}")
        if len(self.shape) != 2 or self.strides[1] != 1:
            raise UnknownInstructionError("a tensor map that is not of rows")
        if self.start % 16 or self.strides[0] * self.itemsize % 16:
            raise FaultError(
                f"a tensor map's start and rows must be aligned to 16 bytes, got {self.start:#x}, {self.strides}"
            )

    @property
    def bytes(self):
        return self.box[0] * self.box[1] * self.itemsize

    def places(self, corner, shared):
        """(addresses in global memory, in shared memory, which of them are within the tensor), each [rows, columns]."""
        row, column = np.meshgrid(*map(np.arange, self.box), indexing="ij")
        if shared % 128:
            raise FaultError(f"the copy engine needs shared memory aligned to 128 bytes, got {shared:#x}")
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
            raise FaultError(f"there is no barrier at {place:#x}")
        return self.barriers[program][place]

    def start_barrier(self, program, place, count):
        if place % 8 or place + 8 > self.batch.shared.size:
            raise FaultError(f"a barrier must be aligned to 8 bytes within shared memory, got {place:#x}")
        if place in self.barriers[program]:
            raise FaultError(f"the barrier at {place:#x} is in use")
        self.barriers[program][place] = Barrier(count)

    def load(self, program, thread, tensor_map, corner, shared, place):
        barrier = self.barrier(program, place)
        _, here, _ = tensor_map.places(corner, shared)
        self.batch.shared.expect(*self._of_program(program, here), 1, tensor_map.unsigned, by=thread // WARP)
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
        while barrier.parity == parity and barrier.pending:
            self.batch.count_ended(1)
            self._land(program, barrier)
        if barrier.parity == parity:
            raise FaultError(
                f"waits for ever at {place:#x}, which lacks {barrier.arrivals} arrivals and {barrier.bytes} bytes"
            )
        return True

    def store(self, program, thread, tensor_map, corner, shared, adds):
        copy = thread, tensor_map, corner, shared, adds
        if self.batch.launch.late:
            self.stores[program][thread].asked.append(copy)
        else:
            self._store(program, [copy])

    def commit_stores(self, program, thread):
        stores = self.stores[program][thread]
        stores.groups.append(stores.asked)
        stores.asked = []

    def wait_for_stores(self, program, thread, allowed):
        """Wait until no more than so many of the newest groups are on their way."""
        groups = self.stores[program][thread].groups
        while len(groups) > allowed:
            self.batch.count_ended(len(groups[0]))
            self._store(program, groups.pop(0))

    def end(self):
        """Shared memory is gone when its program ends: whoever has the copy engine read it waits for that."""
        if any(stores.asked or stores.groups for by_thread in self.stores for stores in by_thread.values()):
            raise FaultError("a program ends while the copy engine may still read its shared memory")

    def _land(self, program, barrier):
        """The copy that was asked for first."""
        tensor_map, corner, shared = barrier.pending.pop(0)
        there, here, inside = tensor_map.places(corner, shared)
        values = np.zeros((here.size, 1), tensor_map.unsigned)
        values[inside.reshape(-1)] = self.batch.launch.memory.load(there[inside], 1, tensor_map.unsigned)
        self.batch.shared.land(*self._of_program(program, here), values, is_seen_by_all=True)
        barrier.bytes -= tensor_map.bytes
        barrier.check()

    def _store(self, program, group):
        for thread, tensor_map, corner, shared, adds in group:
            there, here, inside = tensor_map.places(corner, shared)
            if tensor_map.itemsize != 4:
                raise UnknownInstructionError("stores of tiles that are not of 32 bits")
            values = self.batch.shared.load(*self._of_program(program, here), 1, np.float32, by=thread // WARP)
            values = values[inside.reshape(-1)]
            memory = self.batch.launch.memory
            (memory.add if adds else memory.store)(there[inside], values)

    def _of_program(self, program, places):
        """The places, and the mask, of this program alone."""
        chosen = np.zeros((len(self.batch.places), places.size), np.bool_)
        chosen[program] = True
        return places.reshape(1, -1), chosen


def decode(instruction, program):
    """The instruction's function of a batch and a mask; None if it has nothing to do with the copy engine."""
    name = instruction.name
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
    place = shared_places(program, operands[0])
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
    shared, barrier = (shared_places(program, operand) for operand in (shared, barrier))
    tile = _tile(instruction, program, tile)

    def load(batch, mask):
        for one in _each_thread(batch, mask):
            places = int(shared(batch)[one]), int(barrier(batch)[one])
            batch.engine(EngineCopies).load(*one, *tile(batch, *one), *places)

    return load


def _tile_store(instruction, program):
    tile, shared = instruction.operands
    tile, shared = _tile(instruction, program, tile), shared_places(program, shared)
    adds = instruction.parts[1] == "reduce"
    if adds and not instruction.has("add"):
        raise UnknownInstructionError(f"no meaning of {instruction}")

    def store(batch, mask):
        for one in _each_thread(batch, mask):
            batch.engine(EngineCopies).store(*one, *tile(batch, *one), int(shared(batch)[one]), adds)

    return store
