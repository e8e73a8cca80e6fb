"""The machine code of a compiled kernel: its loops, and how many instructions of each kind they have.

    listing --blocks, edges--> dominators --> natural loops

A backward branch alone does not make a loop: the assembler lays code that waits for a barrier after a kernel's end, and
jumps back from there. So a loop is what can reach a branch to a block that every way to this branch passes through.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
KINDS = {
    "matrix": "HGMMA HMMA UTCHMMA UTCQMMA QGMMA QMMA IGMMA IMMA DMMA",
    "special": "MUFU",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LDG STG REDG RED ATOMG ATOM LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
    "tensor": "LDTM STTM UTCCP",
    "local": "LDL STL",
}
"""Opcodes by kind: matrix products, special functions, float32 arithmetic, and memory, of which "tensor" is that of
Blackwell's matrix units. Whatever is not here is "other"."""
_KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
_LABEL = re.compile(r"^(\.L\w+|[\w.]+):\s*$")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`?\(?(\.L\w+)\)?\s*$")
_LEAVING = {"EXIT", "RET", "BRX", "JMX"}


@dataclass(frozen=True)
class Instruction:
    """An instruction without its encoding."""

    opcode: str
    """With its modifiers, as in "LDS.128"."""
    operands: str
    is_guarded: bool
    """Whether it depends on a predicate."""

    @property
    def name(self):
        return self.opcode.partition(".")[0]

    @property
    def kind(self):
        return _KIND_OF.get(self.name, "other")

    @property
    def target(self):
        """The label that it jumps to, if it does."""
        found = _TARGET.search(self.operands) if self.name in ("BRA", "JMP", "CALL") else None
        return found[1] if found else None

    @property
    def goes_on(self):
        """Whether the instruction after it may be the next one."""
        if self.name in _LEAVING:
            return self.is_guarded
        # "BRA.U !UP0, target" has its condition among the operands. A call may return; before sm_90 some leave loops.
        return self.target is None or self.is_guarded or "," in self.operands or self.name == "CALL"


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block at which it is entered, all of its blocks, and those that every trip passes through."""

    header: int
    blocks: frozenset[int]
    always: frozenset[int]


class MachineCode:
    """A kernel's instructions in blocks that are entered at their beginning only.

    Args:
        listing: as `nvdisasm -c` prints it.
    """

    def __init__(self, listing):
        self.blocks, labels = _blocks(listing)
        self.next = [_next(place, block, labels, len(self.blocks)) for place, block in enumerate(self.blocks)]

    @classmethod
    def of(cls, kernel):
        """The machine code of a kernel that Triton has compiled."""
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            done = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True)
        return cls(done.stdout)

    @cached_property
    def loops(self):
        """All loops, outer ones before those within them, else in the order of the code."""
        dominators, before = _dominators(self.next), _before(self.next)
        ends = {}
        for place in dominators:
            for header in self.next[place]:
                if header in dominators[place]:
                    ends.setdefault(header, []).append(place)
        found = []
        for header, latches in ends.items():
            body = frozenset(_reaching(latches, header, before))
            found.append(Loop(header, body, body.intersection(*(dominators[latch] for latch in latches))))
        return sorted(found, key=lambda loop: (loop.header, -len(loop.blocks)))

    @cached_property
    def matrix_loops(self):
        """Innermost loops that have matrix products."""
        having = [loop for loop in self.loops if self.counts(loop.blocks)["matrix"]]
        return [loop for loop in having if not any(other.blocks < loop.blocks for other in having)]

    def around(self, inner):
        """The smallest loop that another one lies in; None if there is none."""
        outer = [loop for loop in self.loops if inner.blocks < loop.blocks]
        return min(outer, key=lambda loop: len(loop.blocks), default=None)

    def instructions(self, blocks=None):
        """The instructions of some blocks, or of all."""
        places = range(len(self.blocks)) if blocks is None else sorted(blocks)
        return [instruction for place in places for instruction in self.blocks[place]]

    def counts(self, blocks=None):
        """How many instructions of each kind some blocks have, or all."""
        return Counter(instruction.kind for instruction in self.instructions(blocks))

    @property
    def inner_local(self):
        """Loads from and stores to local memory within the innermost loops that have matrix products."""
        return sum(self.counts(loop.blocks)["local"] for loop in self.matrix_loops)


def _blocks(listing):
    """The blocks of instructions, and which one each label is before."""
    blocks, labels = [[]], {}
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.search(line):
            guard, opcode, operands = found.groups()
            blocks[-1].append(Instruction(opcode, operands.strip(), guard is not None))
            if blocks[-1][-1].target or blocks[-1][-1].name in _LEAVING:
                blocks.append([])
    return blocks, labels


def _next(place, block, labels, count):
    """The blocks that may come after one."""
    last = block[-1] if block else None
    following = set() if last is None or last.target is None else {labels[last.target]}
    if (last is None or last.goes_on) and place + 1 < count:
        following.add(place + 1)
    return following


def _before(following):
    """For each block that is ever reached those that may come before it."""
    before, waiting = {}, [0]
    while waiting:
        place = waiting.pop()
        for other in following[place]:
            if other not in before:
                before[other] = set()
                waiting.append(other)
            before[other].add(place)
    return before


def _dominators(following):
    """For each block that is ever reached those that every way to it from the first one passes through, itself too."""
    before = _before(following)
    found = {0: frozenset({0}), **{place: frozenset(before) | {0} for place in before if place}}
    changed = True
    while changed:
        changed = False
        for place in sorted(found.keys() - {0}):
            now = frozenset.intersection(*(found[other] for other in before[place])) | {place}
            changed |= now != found[place]
            found[place] = now
    return found


def _reaching(latches, header, before):
    """The blocks from which a branch back is reached without passing through the header, and the header."""
    body, waiting = {header}, list(latches)
    while waiting:
        place = waiting.pop()
        if place not in body:
            body.add(place)
            waiting += before[place]
    return body
