"""How many cycles a processor takes for 128 rows and a layer, reckoned from the machine code. Nothing here is measured.

    python -m tests.support.reckoned                          the tiles in use on Hopper
    python -m tests.support.reckoned --dim 64 --kernel forward 64,32,4 128,64,8      these tiles of a kernel

A layer is the innermost matrix loop times its trips, and the rest of the loop over the layers, or where both are one
loop what not every trip passes through. Each unit of a processor takes what is its own at a fixed rate, and all work
side by side, so that the busiest is a bound, however many programs there are. A program alone takes longer: it
multiplies, computes activations from the products, and waits for both, for its other warps and for memory. Programs on
the same processor fill each other's waits, as many as registers, shared memory and threads allow:

    cycles = max(busiest, alone / programs),    alone = matrix products + the busiest of the others + waits

It knows no conflicts of banks, no misses of caches, and no order of instructions; the waits are assumed. No GPU has
confirmed it: take a difference below a third as none.
"""

import argparse
import math
import re
from dataclasses import dataclass
from unittest import mock

from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.fused.triton.tiles import Tile, Tiles, tiles_for
from tests.support.fused_compiled import SIZES, Configuration, compiled
from tests.support.machine_code import MachineCode
from tests.support.triton_compiled import resources

ROWS = 128
ISSUED, SPECIAL_LANES, HALF_LANES, SHARED_BYTES, FLOPS = 4, 16, 64, 128, 4096
"""What a processor of compute capability 9.0 takes in a cycle: instructions of warps, lanes of special functions, lanes
of integers and conversions, bytes of shared memory, operations of dense products of 16-bit operands."""
MMA_SYNC = 0.62
"""Part of the rate of warp groups' products that single warps' reach."""
ISSUE_EVERY = 2
"""Cycles between two instructions of a warp, on average, in code that waits for no memory; assumed."""
PRODUCT_WAIT, BARRIER_WAIT, MEMORY_WAIT = 64, 30, 600
"""Cycles until the last product of a group is there, the other warps are, or a layer's first chunk; assumed."""
REGISTERS, SHARED, WARPS, MOST_PROGRAMS = 65_536, 227 * 1024, 64, 32
"""What a processor has."""
PROGRAM_SHARED = 1024
"""Bytes of shared memory that the system takes for a program."""
KERNELS = {
    "forward": ("forward", "extrapolated", "two_pass"),
    "two_pass": ("adjoint", "extrapolated", "two_pass"),
    "one_pass": ("adjoint", "extrapolated", "one_pass"),
    "exact": ("exact", "checkpoint", "two_pass"),
    "weight_gradient": ("weight_gradient", "extrapolated", "two_pass"),
}
"""By the field of `Tiles`: the kernel, and the reverse preset and gradient form with which it is launched."""
HALF_RATE = {
    *("IMAD", "IADD3", "VIADD", "LEA", "SHF", "LOP3", "PRMT", "SEL", "ISETP", "VIMNMX"),
    *("FSEL", "FSETP", "FMNMX", "F2FP", "F2F", "F2I", "I2F"),
}
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_MMA_FLOPS = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Reckoned:
    """Cycles for 128 rows and a layer: of each unit, of a program alone, and with as many programs as fit."""

    units: dict[str, float]
    alone: float
    programs: int

    @property
    def busiest(self):
        return max(self.units.values())

    @property
    def cycles(self):
        return max(self.busiest, self.alone / self.programs) if self.programs else math.inf


@dataclass(frozen=True)
class Work:
    """What a warp does in some instructions, in the units' own measure."""

    issued: float = 0
    special: float = 0
    half: float = 0
    shared: float = 0
    matrix: float = 0
    waits: float = 0

    @classmethod
    def of(cls, instructions):
        names = [instruction.name for instruction in instructions]
        groups = sum("gsb0" in instruction.operands for instruction in instructions)
        return cls(
            len(names),
            32 * names.count("MUFU") / SPECIAL_LANES,
            32 * sum(name in HALF_RATE for name in names) / HALF_LANES,
            sum(map(_shared_bytes, instructions)) / SHARED_BYTES,
            sum(map(_flops, instructions)) / FLOPS,
            PRODUCT_WAIT * groups + BARRIER_WAIT * names.count("BAR"),
        )

    def plus(self, other, times=1):
        return Work(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def _shared_bytes(instruction):
    """Bytes of shared memory that a warp reads or writes by an instruction, its part of the products' operands too."""
    name, opcode = instruction.name, instruction.opcode
    if name in ("LDSM", "STSM"):
        return 128 * int(re.search(r"\d$", opcode)[0])
    if name in ("LDS", "STS", "LDGSTS", "LDL", "STL"):  # local memory lies in the same cache
        width = re.search(r"\.(128|64|U?8|U?16)\b", opcode)
        return 32 * (int(width[1].strip("U")) // 8 if width else 4)
    if name == "HGMMA":
        m, n, k = map(int, _SHAPE.search(opcode).groups())
        # The second operand, and the first unless it comes from registers; a group is four warps.
        return 2 * k * (n + m * instruction.operands.split(",")[1].strip().startswith("gdesc")) / 4
    return 0


def _flops(instruction):
    """Operations of a warp's product, in those of a warp group that take as long."""
    if instruction.name == "HMMA":
        return _MMA_FLOPS / MMA_SYNC
    if instruction.name != "HGMMA":
        return 0
    m, n, k = map(int, _SHAPE.search(instruction.opcode).groups())
    return 2 * m * n * k / 4


def programs_at_once(used, warps):
    """How many programs a processor holds; none where one takes more shared memory than there is."""
    of_warp = -(-used["registers"] // 8) * 8 * 32
    return min(
        MOST_PROGRAMS,
        WARPS // warps,
        # Registers belong to the four schedulers.
        REGISTERS // 4 // of_warp * 4 // warps,
        (SHARED + PROGRAM_SHARED) // (used["shared"] + PROGRAM_SHARED),
    )


def reckon(kernel, code, used, tile, hidden):
    """What a kernel that is compiled with a tile takes.

    Args:
        kernel: a field of `Tiles`.
        code: its `MachineCode`.
        used: its `resources`.
    """
    trips, work = hidden // tile.chunk, Work()
    loops = code.matrix_loops
    if kernel == "forward":
        loops = loops[:1]  # the other one is of the last steps, whose increments are saved
    for loop in loops:
        work = work.plus(Work.of(code.instructions(loop.always)), trips)
        work = work.plus(Work.of(code.instructions(loop.blocks - loop.always)))
    if kernel != "weight_gradient":  # whose loop is that over the rows
        for layers in {code.around(loop) for loop in loops} - {None}:
            rest = layers.blocks.difference(*(loop.blocks for loop in loops))
            work = work.plus(Work.of(code.instructions(rest)))
            work = work.plus(Work(waits=MEMORY_WAIT * sum(loop.blocks < layers.blocks for loop in loops)))
    times = ROWS / tile.rows
    units = {name: times * tile.warps * amount for name, amount in vars(work).items() if name != "waits"}
    units["issued"] /= ISSUED
    others = max(amount for name, amount in units.items() if name != "matrix")
    alone = units["matrix"] + max(others, times * ISSUE_EVERY * work.issued) + times * work.waits
    return Reckoned(units, alone, programs_at_once(used, tile.warps))


def reckoned(kernel, dim, tile=None, gpu=90):
    """(tile, resources, machine code, what it takes) of the tile, or that in use, in bfloat16 with SiLU."""
    name, reverse, form = KERNELS[kernel]
    tiles = tiles_for(divmod(gpu, 10), dim, 2, True)
    tile = tile or (tiles.weights_for(SIZES[dim]) if kernel == "weight_gradient" else getattr(tiles, kernel))
    changed = tiles._replace(**{kernel: tile})
    with mock.patch.object(triton_passes, "tiles_for", return_value=changed):
        found = dict(compiled(Configuration(gpu, dim, reverse, gradient_form=form)))[f"{name}_kernel"]
    code, used = MachineCode.of(found), resources(found)
    return tile, used, code, reckon(kernel, code, used, tile, SIZES[dim])


def row(kernel, dim, tile=None):
    """A line for people."""
    tile, used, code, found = reckoned(kernel, dim, tile)
    units = "  ".join(f"{name} {amount:6.0f}" for name, amount in found.units.items())
    return "  ".join(
        [
            f"{dim:4} {kernel:15} {','.join(map(str, tile)):12} reckoned {found.cycles:7.0f} cycles",
            f"{units}  alone {found.alone:7.0f}  programs {found.programs}",
            f"registers {used['registers']}  local {used['local']}, inner {code.inner_local}",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, choices=(64, 128), help="only this dim")
    parser.add_argument("--kernel", choices=Tiles._fields, help="only this kernel")
    parser.add_argument("tiles", nargs="*", help="rows,chunk,warps[,stages] in place of the tile in use")
    given = parser.parse_args()
    for dim in [given.dim] if given.dim else [64, 128]:
        for kernel in [given.kernel] if given.kernel else [name for name in KERNELS if dim == 64 or name != "one_pass"]:
            for tile in [Tile(*map(int, text.split(","))) for text in given.tiles] or [None]:
                print(row(kernel, dim, tile), flush=True)


if __name__ == "__main__":
    main()
