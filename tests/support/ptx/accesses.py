"""Loads, stores and additions in memory, and values that the threads of a warp hand each other."""

import numpy as np

from .arithmetic import NUMBERS
from .assembly import members
from .faults import UnknownInstructionError
from .state import WARP, global_places, reader, shared_places, writer


def decode(instruction, program):
    """The instruction's function of a batch and a mask; None if it is none of these."""
    kind = instruction.parts[0]
    if kind == "cvta":
        return _copy(instruction, program)
    if kind == "ld" and instruction.parts[1] == "param":
        return _parameter(instruction, program)
    if kind in ("ld", "st", "atom", "red"):
        return _access(instruction, program)
    if kind == "shfl":
        return _exchange(instruction, program)
    if kind == "redux":
        return _reduction(instruction, program)
    if kind == "elect":
        return _election(instruction, program)
    return None


def _copy(instruction, program):
    read, write = reader(program, instruction.operands[1], "u64"), writer(program, instruction.operands[0], "u64")
    return lambda batch, mask: write(batch, mask, read(batch))


def _parameter(instruction, program):
    target, source = instruction.operands
    number = np.dtype(f"u{NUMBERS[instruction.type]().itemsize}")
    place, write = program.parameters.index(source.strip("[] ")), writer(program, target, instruction.type)

    def load(batch, mask):
        bits = batch.launch.arguments[place] & (2 ** (8 * number.itemsize) - 1)
        write(batch, mask, np.array(bits, number))

    return load


def _access(instruction, program):
    kind, space = instruction.parts[:2]
    if space.split("::")[0] not in ("global", "shared"):
        raise UnknownInstructionError(f"no meaning of {instruction}")
    place_of = shared_places if space.startswith("shared") else global_places
    at = next(i for i, operand in enumerate(instruction.operands) if operand.startswith("["))
    place = place_of(program, instruction.operands[at])
    type_ = instruction.type
    number = np.dtype(NUMBERS[type_])
    if kind == "ld":
        return _load(space, place, [writer(program, name, type_) for name in members(instruction.operands[0])], number)
    values = [reader(program, name, type_) for name in members(instruction.operands[-1])]
    if kind == "st":
        return _store(space, place, values, number)
    if not instruction.has("add") or space != "global" or type_ not in ("f32", "f64"):
        raise UnknownInstructionError(f"no meaning of {instruction}")
    targets = members(instruction.operands[0]) if kind == "atom" else ["_"] * len(values)
    return _add(place, values, [writer(program, name, type_) for name in targets], number)


def _load(space, place, targets, number):
    def load(batch, mask):
        chosen = batch.everywhere(mask)
        if space.startswith("shared"):
            found = batch.shared.load(place(batch), chosen, len(targets), number)
        else:
            found = batch.launch.memory.load(place(batch)[chosen], len(targets), number)
        _write_each(batch, mask, chosen, targets, found)

    return load


def _write_each(batch, mask, chosen, targets, found):
    for column, write in enumerate(targets):
        value = np.zeros(batch.shape, found.dtype)
        value[chosen] = found[:, column]
        write(batch, mask, value)


def _values(batch, chosen, values):
    return np.stack([np.broadcast_to(read(batch), batch.shape)[chosen] for read in values], 1)


def _store(space, place, values, number):
    def store(batch, mask):
        chosen = batch.everywhere(mask)
        stored = _values(batch, chosen, values)
        if space.startswith("shared"):
            batch.shared.store(place(batch), chosen, stored)
        else:
            batch.launch.memory.store(place(batch)[chosen], stored)

    return store


def _add(place, values, targets, number):
    def add(batch, mask):
        chosen = batch.everywhere(mask)
        before = batch.launch.memory.add(place(batch)[chosen], _values(batch, chosen, values))
        _write_each(batch, mask, chosen, targets, before)

    return add


def _exchange(instruction, program):
    """Values of other threads of the warp."""
    target, value, other, clamp, _ = instruction.operands
    write = writer(program, target.split("|")[0], "b32")
    value, other = reader(program, value, "b32"), reader(program, other, "u32")
    mode = instruction.parts[2]
    if clamp != "31" or mode not in ("bfly", "idx"):
        raise UnknownInstructionError(f"no meaning of {instruction}")

    def exchange(batch, mask):
        lane = np.arange(batch.threads) % WARP
        by = np.broadcast_to(other(batch), batch.shape).astype(np.int64)
        source = lane ^ by if mode == "bfly" else by % WARP
        thread = np.arange(batch.threads) - lane + source
        write(batch, mask, np.take_along_axis(np.broadcast_to(value(batch), batch.shape), thread, 1))

    return exchange


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _reduction(instruction, program):
    """Every thread's value of a warp, joined."""
    target, value, members_of_warp = instruction.operands
    join, type_ = _REDUCTIONS[instruction.parts[2]], instruction.type
    value, write = reader(program, value, type_), writer(program, target, type_)
    chosen = reader(program, members_of_warp, "u32")

    def reduce(batch, mask):
        if (chosen(batch) != 0xFFFFFFFF).any() or mask is not None:
            raise UnknownInstructionError(f"a part of a warp: {instruction}")
        by_warp = np.broadcast_to(value(batch), batch.shape).reshape(len(batch.places), -1, WARP)
        write(batch, mask, np.repeat(join.reduce(by_warp, 2), WARP, 1))

    return reduce


def _election(instruction, program):
    """One thread of each warp, the first."""
    target, chosen = instruction.operands[0].split("|")
    write, write_chosen = writer(program, target, "b32"), writer(program, chosen, "pred")

    def elect(batch, mask):
        write(batch, mask, np.uint32(0))
        write_chosen(batch, mask, np.broadcast_to(np.arange(batch.threads) % WARP == 0, batch.shape))

    return elect
