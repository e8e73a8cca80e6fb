"""Matrix products: by warps (mma.sync) at once, by warpgroups (wgmma) in groups that are waited for.

A warp's fragment of 16 x 16 values of 16 bits is four registers: thread t has the columns 2 (t % 4) and the next one of
the rows t // 4 and 8 more, then of the columns 8 more. One of 16 x 8 float32 is four too: the same places. Late
products read their operands, and add to their registers, only where they are waited for.
"""

import re

import numpy as np

from .arithmetic import FROM_NARROW
from .assembly import members
from .faults import FaultError, UnknownInstructionError
from .shared_memory import MATRIX_UNITS, swizzled
from .state import WARP, reader, shared_places, writer

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2
GROUP = 4 * WARP


class Products:
    """The products of warpgroups of a batch that are not waited for yet."""

    def __init__(self, batch):
        self.batch, self.asked, self.groups = batch, [], []
        self.sums = {}

    def of(self, batch, programs):
        part = object.__new__(Products)
        part.batch = batch
        part.asked = [product.of(programs) for product in self.asked]
        part.groups = [[product.of(programs) for product in group] for group in self.groups]
        part.sums = {register: value[programs] for register, value in self.sums.items()}
        return part

    def ask(self, product):
        if not self.batch.launch.late:
            product.add(self.batch, self.batch.registers)
            return
        for register in product.registers:
            # Until it is waited for, nobody may read it.
            if register not in self.sums:
                self.sums[register] = self.batch.registers[register]
            elif self.batch.registers[register] is not None:
                raise FaultError("a register is written while a product is still to be added to it")
            self.batch.registers[register] = None
        self.asked.append(product)

    def commit(self):
        self.groups.append(self.asked)
        self.asked = []

    def wait(self, allowed):
        """Wait until no more than so many of the newest groups are on their way."""
        while len(self.groups) > allowed:
            self.batch.count_ended(len(self.groups[0]))
            for product in self.groups.pop(0):
                product.add(self.batch, self.sums)
        still = {r for group in [*self.groups, self.asked] for product in group for r in product.registers}
        for register in [register for register in self.sums if register not in still]:
            if self.batch.registers[register] is not None:
                raise FaultError("a register is written while a product is still to be added to it")
            self.batch.registers[register] = self.sums.pop(register)


class Product:
    """One wgmma: sums of 64 x n in registers, plus A, from registers or shared memory, times B."""

    def __init__(self, form, a, b, keeps):
        self.form, self.a, self.b, self.keeps = form, a, b, keeps

    @property
    def registers(self):
        return self.form.sums

    def of(self, programs):
        a = self.a[programs] if isinstance(self.a, np.ndarray) else self.a
        return Product(self.form, a, self.b[programs], self.keeps)

    def add(self, batch, sums):
        """Add to the sums, by register."""
        form, programs, groups = self.form, len(batch.places), batch.threads // GROUP
        if isinstance(self.a, np.ndarray):
            a = form.matrix(batch, self.a, 64, form.a_is_transposed)
        else:
            a = _fragment(self.a(batch), form.numbers).reshape(programs * groups, 64, 16)
        b = form.matrix(batch, self.b, form.columns, form.b_is_transposed)
        product = np.matmul(a.astype(np.float64), b.transpose(0, 2, 1).astype(np.float64))
        product = product.reshape(programs, batch.threads // WARP, 16, form.columns)
        for place, register in enumerate(form.sums):
            row, column = ROW + 8 * (place % 4 // 2), 8 * (place // 4) + COLUMN + place % 2
            value = product[:, :, row, column].reshape(batch.shape)
            if self.keeps:
                if sums[register] is None:
                    raise FaultError("a product is added to a register without a value")
                value = value + sums[register].view(np.float32)
            sums[register] = value.astype(np.float32).view(np.uint32)


class WarpgroupForm:
    """How one wgmma instruction takes its operands."""

    def __init__(self, instruction, program):
        found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.name)
        if not found:
            raise UnknownInstructionError(f"no meaning of {instruction}")
        self.columns, self.numbers = int(found[1]), FROM_NARROW[found[2]]
        sums, a, b, keeps, a_sign, b_sign, *transposed = instruction.operands
        self.sums = [program.registers[name][0] for name in members(sums)]
        self.a_is_registers = a.startswith("{")
        # A from registers has no transposed form; the last flag is B's.
        self.a_is_transposed = not self.a_is_registers and transposed[0] == "1"
        self.b_is_transposed = transposed[-1] == "1"
        if (a_sign, b_sign) != ("1", "1") or len(self.sums) != self.columns // 2:
            raise UnknownInstructionError(f"no meaning of {instruction}")
        if self.a_is_registers:
            each = [reader(program, name, "b32") for name in members(a)]
            self.read_a = lambda batch: lambda later: [read(later) for read in each]
        else:
            self.read_a = _of_groups(reader(program, a, "b64"))
        self.read_b = _of_groups(reader(program, b, "b64"))
        self.keeps = reader(program, keeps, "pred")

    def matrix(self, batch, descriptors, rows, is_transposed):
        """The operand [groups, rows, 16] that descriptors [programs, groups] tell of.

        Its parts of 8 rows of 16 to 128 bytes, as many as a swizzle mixes, lie as the descriptor's two strides say:
        along the rows, or where it is transposed along the other dimension.
        """
        start, leading, stride, mode = _fields(descriptors)
        if mode == 0:
            raise UnknownInstructionError("operands of wgmma that are not swizzled")
        width = 16 << mode
        row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
        if is_transposed:
            per = width // 2
            places = row // per * leading + row % per * 2 + k // 8 * stride + k % 8 * width
        else:
            places = row // 8 * stride + row % 8 * width + k * 2
        places = swizzled(start.astype(np.int64)[:, :, None, None] + places, mode)
        flat = places.reshape(len(batch.places), -1)
        unit = MATRIX_UNITS + np.repeat(np.arange(start.shape[1]), rows * 16)
        bits = batch.shared.load(flat, np.ones(flat.shape, np.bool_), 1, np.uint16, by=unit)
        return self.numbers(bits).reshape(-1, rows, 16)


def _of_groups(read):
    """A function of a batch: one value for each warpgroup, [programs, groups]."""

    def values(batch):
        by_group = np.broadcast_to(read(batch), batch.shape).reshape(len(batch.places), -1, GROUP)
        if (by_group != by_group[:, :, :1]).any():
            raise FaultError("threads of a warpgroup differ in where an operand of their product is")
        return np.array(by_group[:, :, 0])

    return values


def _fields(descriptors):
    """(start, leading stride, stride) in bytes, of each; and the mode of the swizzle, the same for all."""
    strides = np.unique(descriptors >> np.uint64(16))
    if len(strides) > 1 or int(strides[0]) >> 33 & 7:  # a base offset
        raise UnknownInstructionError("operands of wgmma that lie in different ways")
    rest = int(strides[0])
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[rest >> 46]
    return (descriptors & np.uint64(0x3FFF)) << np.uint64(4), (rest & 0x3FFF) << 4, (rest >> 16 & 0x3FFF) << 4, mode


def _fragment(registers, numbers):
    """[programs, warps, 16, 16] of the four registers of each thread."""
    programs, threads = registers[0].shape
    out = np.empty((programs, threads // WARP, 16, 16), np.float32)
    for place, register in enumerate(registers):
        by_warp = register.reshape(programs, -1, WARP)
        row, column = ROW + 8 * (place % 2), COLUMN + 8 * (place // 2)
        out[:, :, row, column] = numbers((by_warp & np.uint32(0xFFFF)).astype(np.uint16))
        out[:, :, row, column + 1] = numbers((by_warp >> np.uint32(16)).astype(np.uint16))
    return out


def decode(instruction, program):
    """The instruction's function of a batch and a mask; None if it has nothing to do with products."""
    name = instruction.name
    if name.startswith("wgmma.mma_async"):
        return _warpgroup_product(instruction, program)
    if name.startswith("wgmma.commit_group"):
        return lambda batch, mask: batch.engine(Products).commit()
    if name.startswith("wgmma.wait_group"):
        allowed = int(instruction.operands[0], 0)
        return lambda batch, mask: batch.engine(Products).wait(allowed)
    if name.startswith("mma.sync"):
        return _warp_product(instruction, program)
    if name.startswith(("ldmatrix", "stmatrix")):
        return _matrices(instruction, program)
    return None


def _warpgroup_product(instruction, program):
    form = WarpgroupForm(instruction, program)

    def multiply(batch, mask):
        if mask is not None and not mask.all():
            raise FaultError("a warpgroup's product that some of its threads skip")
        keeps = np.unique(form.keeps(batch))
        if len(keeps) > 1:
            raise FaultError("threads of a warpgroup differ in whether a product is added")
        batch.engine(Products).ask(Product(form, form.read_a(batch), form.read_b(batch), bool(keeps[0])))

    return multiply


def _warp_product(instruction, program):
    found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", instruction.name)
    if not found:
        raise UnknownInstructionError(f"no meaning of {instruction}")
    numbers = FROM_NARROW[found[1]]
    out, a, b, c = (list(members(operand)) for operand in instruction.operands)
    a, b = ([reader(program, name, "b32") for name in names] for names in (a, b))
    c = [reader(program, name, "f32") for name in c]
    out = [writer(program, name, "f32") for name in out]

    def multiply(batch, mask):
        _all_take_part(mask)
        left = _fragment([read(batch) for read in a], numbers)
        right = np.empty((len(batch.places), batch.threads // WARP, 8, 16), np.float32)
        for place, read in enumerate(b):
            by_warp = read(batch).reshape(len(batch.places), -1, WARP)
            right[:, :, ROW, COLUMN + 8 * place] = numbers((by_warp & np.uint32(0xFFFF)).astype(np.uint16))
            right[:, :, ROW, COLUMN + 8 * place + 1] = numbers((by_warp >> np.uint32(16)).astype(np.uint16))
        product = np.matmul(left.astype(np.float64), right.transpose(0, 1, 3, 2).astype(np.float64))
        before = [read(batch) for read in c]
        for place, write in enumerate(out):
            value = product[:, :, ROW + 8 * (place // 2), COLUMN + place % 2].reshape(batch.shape)
            write(batch, mask, (value + before[place]).astype(np.float32))

    return multiply


def _matrices(instruction, program):
    """Matrices of 8 x 8 values of 16 bits between shared memory and registers: thread i has a row's address."""
    is_load = instruction.parts[0] == "ldmatrix"
    place, registers = instruction.operands[:: 1 if not is_load else -1]
    place, registers = shared_places(program, place), members(registers)
    is_transposed = instruction.has("trans")
    if not instruction.has("b16"):
        raise UnknownInstructionError(f"no meaning of {instruction}")
    if is_load:
        registers = [writer(program, name, "b32") for name in registers]
    else:
        registers = [reader(program, name, "b32") for name in registers]

    def load(batch, mask):
        _all_take_part(mask)
        by_warp = place(batch).reshape(len(batch.places), -1, WARP)
        for number, write in enumerate(registers):
            rows = _of_matrix(by_warp, number)
            matrix = batch.shared.load(rows, np.ones(rows.shape, np.bool_), 8, np.uint16).reshape(-1, 8, 8)
            if is_transposed:
                matrix = matrix.transpose(0, 2, 1)
            write(batch, mask, np.ascontiguousarray(matrix).view(np.uint32).reshape(batch.shape))

    def store(batch, mask):
        _all_take_part(mask)
        by_warp = place(batch).reshape(len(batch.places), -1, WARP)
        for number, read in enumerate(registers):
            matrix = np.ascontiguousarray(read(batch)).view(np.uint16).reshape(-1, 8, 8)
            if is_transposed:
                matrix = matrix.transpose(0, 2, 1)
            rows = _of_matrix(by_warp, number)
            batch.shared.store(rows, np.ones(rows.shape, np.bool_), np.ascontiguousarray(matrix).reshape(-1, 8))

    return load if is_load else store


def _all_take_part(mask):
    if mask is not None:
        raise UnknownInstructionError("an instruction of whole warps that some threads skip")


def _of_matrix(by_warp, number):
    """Addresses of a matrix' rows, [programs, warps x 8]."""
    rows = by_warp[:, :, 8 * number : 8 * number + 8]
    return rows.reshape(len(rows), -1)
