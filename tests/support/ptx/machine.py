"""The machine itself: a launch's programs through the code, in lockstep as long as they take the same branches."""

from itertools import product

import numpy as np

from . import accesses, copy_engine, products, thread_copies
from .arithmetic import meaning
from .assembly import members
from .copy_engine import EngineCopies
from .faults import FaultError, UnknownInstructionError
from .flow import Flow
from .products import Products
from .state import Batch, reader, writer
from .thread_copies import ThreadCopies

LANES = 4096
"""Threads that go in lockstep, at the most, unless one program has more."""
MOST_INSTRUCTIONS = 5_000_000
"""Instructions of a batch after which it is taken to run for ever."""
ORDERING = ("bar", "barrier", "fence", "membar", "griddepcontrol", "nothing")
"""Instructions that order what threads do, who here go in order anyway: some are asked for nevertheless."""
NOTHING = ("nothing",)
"""Parts of an instruction that does nothing, for those that are to be left out."""


class Launch:
    """What all programs of a launch have in common.

    arguments: by parameter, the bits of its value; maps: the tensor maps among them, by the parameter's number; late:
    whether copies and products end only where they are waited for; ended: counts how many did, by instruction.
    """

    engines = ThreadCopies, EngineCopies, Products

    def __init__(self, grid, shared_bytes, memory, arguments, maps, late, ended):
        self.grid, self.shared_bytes, self.memory = (*grid, 1, 1)[:3], shared_bytes, memory
        self.arguments, self.maps, self.late, self.ended = arguments, maps, late, ended


class Machine:
    """A program, ready to run."""

    def __init__(self, program):
        self.program = program
        self._flow = Flow(program)
        self._targets = [program.target(one) if one.parts[0] == "bra" else None for one in program.instructions]
        self._guards = [None if one.guard is None else _guard(one, program) for one in program.instructions]
        self._steps = [_step(one, program) for one in program.instructions]

    def run(self, launch):
        """All programs of the launch's grid."""
        places = [place[::-1] for place in product(*map(range, launch.grid[::-1]))]
        together = max(1, LANES // self.program.threads)
        waiting = [Batch(self.program, launch, places[at : at + together]) for at in range(0, len(places), together)]
        while waiting:
            waiting += self._run(waiting.pop(0))

    def _run(self, batch):
        """The batch to its end, or to where its programs part: then what it parts into."""
        instructions, targets, guards, steps = self.program.instructions, self._targets, self._guards, self._steps
        done = 0
        try:
            with np.errstate(all="ignore"):
                while batch.at < len(instructions):
                    batch.meet()
                    at = batch.at
                    batch.at += 1
                    done += 1
                    if done > MOST_INSTRUCTIONS:
                        raise FaultError("it runs for ever")
                    mask = batch.active
                    if guards[at] is not None:
                        mask = guards[at](batch) if mask is None else guards[at](batch) & mask
                        if mask.all():
                            mask = None
                        elif not mask.any():
                            continue
                    if targets[at] is not None:
                        if mask is None or mask is batch.active:
                            batch.at = targets[at]
                        elif batch.active is None and (mask == mask[:, :1]).all():
                            return self._parted(batch, mask[:, 0], targets[at])
                        else:
                            batch.branch(mask, targets[at], self._flow.meeting_place(at))
                    elif steps[at] is None:
                        if mask is not None:
                            raise UnknownInstructionError("threads that end before others")
                        break
                    else:
                        steps[at](batch, mask)
            batch.engine(EngineCopies).end()
        except (FaultError, UnknownInstructionError) as error:
            raise type(error)(f"{self.program.name}: {instructions[at]}: {error}") from error
        return []

    @staticmethod
    def _parted(batch, going, target):
        """The programs that stay, and those that go to the target, each by themselves from now on."""
        parts = batch.of(~going), batch.of(going)
        parts[1].at = target
        return parts


def _guard(instruction, program):
    negated = instruction.guard.startswith("!")
    read = reader(program, instruction.guard.lstrip("!"), "pred")

    def chosen(batch):
        value = np.broadcast_to(read(batch), batch.shape)
        return ~value if negated else value

    return chosen


def _step(instruction, program):
    """The instruction's function of a batch and a mask; None at the end of the code."""
    if instruction.parts[0] in ("ret", "exit", "bra"):
        return None
    if instruction.name.startswith("wgmma.fence") or instruction.parts[0] in ORDERING:
        return _together(instruction)
    for kind in (thread_copies, copy_engine, products, accesses):
        if step := kind.decode(instruction, program):
            return step
    if instruction.parts[0] == "mov" and "{" in instruction.text:
        return _packing(instruction, program)
    return _arithmetic(instruction, program)


def _together(instruction):
    name = instruction.name
    is_barrier = name == "bar.sync" and instruction.operands == ("0",)
    is_fence = name == "fence.proxy.async.shared::cta"
    # Threads of a warp go in order, and nobody else is asked for by these.
    is_for_others = (
        name.startswith(("bar.warp.sync", "wgmma.fence", "membar", "griddepcontrol")) or name == "fence.acq_rel.gpu"
    )
    if not (is_barrier or is_fence or is_for_others or instruction.parts == NOTHING):
        raise UnknownInstructionError(f"no meaning of {instruction}")

    def step(batch, mask):
        if is_barrier:
            if mask is not None:
                raise FaultError("a barrier that some threads miss")
            batch.shared.meet()
        elif is_fence:
            if mask is not None:
                raise UnknownInstructionError("a fence that some threads skip")
            batch.shared.fence()

    return step


def _packing(instruction, program):
    """A register from its parts, or its parts from a register, the lowest first."""
    target, source = instruction.operands
    bits = int(instruction.type[1:])
    narrow = f"u{bits // 2}"
    if len(members(target)) + len(members(source)) != 3:
        raise UnknownInstructionError(f"no meaning of {instruction}")
    if target.startswith("{"):
        read = reader(program, source, f"u{bits}")
        low, high = (writer(program, name, narrow) for name in members(target))

        def unpack(batch, mask):
            value = np.broadcast_to(read(batch), batch.shape)
            real = value.dtype.type
            low(batch, mask, (value & real(2 ** (bits // 2) - 1)).astype(np.dtype(f"u{bits // 16}")))
            high(batch, mask, (value >> real(bits // 2)).astype(np.dtype(f"u{bits // 16}")))

        return unpack
    low, high = (reader(program, name, narrow) for name in members(source))
    write = writer(program, target, f"u{bits}")
    wide = np.dtype(f"u{bits // 8}").type

    def pack(batch, mask):
        write(batch, mask, low(batch).astype(wide) | high(batch).astype(wide) << wide(bits // 2))

    return pack


def _arithmetic(instruction, program):
    found = meaning(instruction)
    if found is None:
        raise UnknownInstructionError(f"no meaning of {instruction}")
    types, type_, function = found
    target, *sources = instruction.operands
    if len(sources) != len(types):
        raise UnknownInstructionError(f"no meaning of {instruction}")
    if "|" in target:
        return _comparison_of_pairs(instruction, program, function)
    reads = [reader(program, source, type_) for source, type_ in zip(sources, types, strict=True)]
    write = writer(program, target, type_)

    def compute(batch, mask):
        write(batch, mask, function(*(read(batch) for read in reads), i=instruction))

    return compute


def _comparison_of_pairs(instruction, program, function):
    """A predicate for each of two 16-bit numbers, the lower one's first."""
    targets, *sources = instruction.operands
    if not instruction.type.endswith("x2"):
        raise UnknownInstructionError(f"no meaning of {instruction}")
    reads = [reader(program, source, "u32") for source in sources]
    writes = [writer(program, name, "pred") for name in targets.split("|")]

    def compare(batch, mask):
        values = [np.asarray(read(batch)) for read in reads]
        for write, shift in zip(writes, (0, 16), strict=True):
            halves = ((value >> np.uint32(shift)).astype(np.uint16) for value in values)
            write(batch, mask, function(*halves, i=instruction))

    return compare
