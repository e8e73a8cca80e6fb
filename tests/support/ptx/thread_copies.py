"""Copies by the threads of a program (cp.async), which go on while the threads do.

At once they land where they are asked for; late only where they are waited for, when they read their source too, so
that whoever overwrites it in between is found out.
"""

import numpy as np

from .faults import UnknownInstructionError
from .state import global_places, reader, shared_places


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
        self.batch.shared.expect(target, chosen, width // 4, np.uint32)
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
            self.batch.count_ended(np.count_nonzero(done))
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
        zeros = np.zeros((np.count_nonzero(nothing), width // 4), np.uint32)
        found = self.batch.launch.memory.load(source[whole], width // 4, np.uint32)
        self.batch.shared.land(target, nothing, zeros, is_seen_by_all=False)
        self.batch.shared.land(target, whole, found, is_seen_by_all=False)


def decode(instruction, program):
    """The instruction's function of a batch and a mask; None if it is no such copy."""
    name = instruction.name
    if name.startswith(("cp.async.ca.shared.global", "cp.async.cg.shared.global")):
        return _copy(instruction, program)
    if name == "cp.async.commit_group":
        return lambda batch, mask: batch.engine(ThreadCopies).commit(mask)
    if name == "cp.async.wait_group":
        allowed = int(instruction.operands[0], 0)
        return lambda batch, mask: batch.engine(ThreadCopies).wait(mask, allowed)
    return None


def _copy(instruction, program):
    target, source, width, *size = instruction.operands
    target, source = shared_places(program, target), global_places(program, source)
    width = int(width, 0)
    size = reader(program, size[0], "u32") if size else (lambda batch: np.uint32(width))

    def copy(batch, mask):
        sizes = np.broadcast_to(size(batch), batch.shape).astype(np.int64)
        batch.engine(ThreadCopies).ask(batch.everywhere(mask), target(batch), source(batch), sizes, width)

    return copy
