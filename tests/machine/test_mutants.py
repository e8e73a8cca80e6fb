"""What the PTX machine catches: kernels that are spoiled by one instruction must not pass."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.triton import passes as triton_passes
from tests.support.fused_cases import Case, check
from tests.support.ptx import launching
from tests.support.ptx.assembly import members
from tests.support.ptx.copy_engine import TensorMap
from tests.support.ptx.faults import FaultError
from tests.support.ptx.fused import fused_on
from tests.support.ptx.machine import NOTHING

CASE = Case(reverse="extrapolated", dim=64, hidden=128, rows=70, steps=2)


class Backend:
    """Triton's, where it launches this kernel; the specification else, which takes less time."""

    def __init__(self, kernel):
        op = {"forward_kernel": "forward", "exact_kernel": "exact_adjoint"}.get(kernel, "adjoint")
        for name in ("forward", "adjoint", "exact_adjoint"):
            setattr(self, name, getattr(triton_passes if name == op else reference, name))


def run(gpu, gradient_form, kernel, late=True, change=None):
    torch.manual_seed(1)
    with fused_on(gpu, gradient_form, late=late, change=change) as record:
        check(Backend(kernel), CASE, torch.bfloat16)
    return record


def spoiling(kernel, pattern, changed, number=0):
    """A change of a kernel: its instruction of that number, of those that look like this, becomes another."""

    def change(program):
        if program.name == kernel:
            found = [at for at, one in enumerate(program.instructions) if re.search(pattern, one.text)]
            if found:
                at = found[number]
                program.instructions[at] = changed(program.instructions[at])

    return change


def dropped(one):
    return replace(one, parts=NOTHING, operands=(), guard=None)


def renamed(before, after):
    return lambda one: replace(one, parts=tuple(one.name.replace(before, after).split(".")))


def rows_swapped(one):
    """The first and the third register of a product's sums, which are eight rows apart."""
    first, second, third, *others = members(one.operands[0])
    sums = "{" + ",".join([third, second, first, *others]) + "}"
    return replace(one, operands=(sums, *one.operands[1:]))


def nothing_copied(one):
    target, source, width, _ = one.operands
    return replace(one, operands=(target, source, width, "0"))


MUTANTS = {
    "a register of wgmma in the wrong row": (90, "one_pass", "adjoint_kernel", r"^wgmma\.mma", rows_swapped),
    "a register of mma.sync in the wrong row": (80, "two_pass", "adjoint_kernel", r"^mma\.sync", rows_swapped),
    "a copy of a thread that brings nothing": (80, "two_pass", "exact_kernel", r"cp\.async\.cg", nothing_copied),
    "a tile that is never copied": (90, "two_pass", "weight_gradient_kernel", r"bulk\.tensor.*mbarrier", dropped),
    "a barrier that is missing": (90, "one_pass", "adjoint_kernel", r"^bar\.sync", dropped),
    "a fence that is missing": (90, "one_pass", "adjoint_kernel", r"^fence\.proxy", dropped),
    "fewer bytes announced": (
        *(90, "two_pass", "adjoint_kernel", "expect_tx"),
        lambda one: replace(one, operands=(*one.operands[:-1], str(int(one.operands[-1]) // 2))),
    ),
    "a reduction that stores": (
        *(90, "one_pass", "adjoint_kernel", r"cp\.reduce"),
        renamed("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add", "cp.async.bulk.tensor.2d.global.shared::cta"),
    ),
    "a row that a warp stores elsewhere": (
        *(90, "one_pass", "adjoint_kernel", r"^stmatrix|st\.shared\.v"),
        lambda one: (
            replace(one, operands=(one.operands[0].replace("]", "+16]").replace("+0+", "+"), *one.operands[1:]))
            if "+" not in one.operands[0]
            else replace(
                one, operands=(re.sub(r"\+(\d+)", lambda m: f"+{int(m[1]) + 16}", one.operands[0]), one.operands[1])
            )
        ),
    ),
}


@pytest.mark.parametrize("launch", [(90, "one_pass"), (90, "two_pass"), (80, "two_pass")], ids=str)
def test_what_is_not_spoiled_passes(launch):
    run(*launch, "adjoint_kernel")


@pytest.mark.parametrize("name", MUTANTS)
def test_is_caught(name):
    gpu, gradient_form, kernel, pattern, changed = MUTANTS[name]
    with pytest.raises((AssertionError, FaultError)):
        run(gpu, gradient_form, kernel, change=spoiling(kernel, pattern, changed))


def test_tiles_that_are_not_swizzled_are_caught():
    def unswizzled(tensor, box, swizzle):
        return TensorMap(tensor, box, 0)

    with mock.patch.object(launching, "TensorMap", unswizzled), pytest.raises(AssertionError):
        run(90, "two_pass", "forward_kernel", change=lambda program: None)


@pytest.mark.parametrize("kernel", ["forward_kernel", "adjoint_kernel", "exact_kernel", "weight_gradient_kernel"])
@pytest.mark.parametrize("gpu", [90, 80])
def test_operands_that_are_cut_off_instead_of_rounded_are_caught(gpu, kernel):
    def truncated(program):
        if program.name == kernel:
            program.instructions = [
                renamed("cvt.rn.bf16", "cvt.rz.bf16")(one) if one.name.startswith("cvt.rn.bf16") else one
                for one in program.instructions
            ]

    with pytest.raises(AssertionError, match="longer by -"):
        run(gpu, "two_pass", kernel, late=False, change=truncated)


EVERYDAY = {"adjoint_kernel": (90, "one_pass"), "exact_kernel": (80, "two_pass")}


@pytest.mark.parametrize(
    ("gpu", "gradient_form", "kernel"),
    [
        pytest.param(*launch, kernel, marks=() if EVERYDAY.get(kernel) == launch else pytest.mark.machine)
        for launch in ((90, "one_pass"), (90, "two_pass"), (80, "two_pass"))
        for kernel in ("forward_kernel", "adjoint_kernel", "exact_kernel", "weight_gradient_kernel")
        if (launch[1], kernel) != ("one_pass", "weight_gradient_kernel")
    ],
)
def test_every_wait_that_is_dropped_is_caught(gpu, gradient_form, kernel):
    """Every one that something ends at: others have nothing to wait for, with so few steps."""
    record = run(gpu, gradient_form, kernel)
    waits = [
        (number, at)
        for number, (program, ended) in enumerate(zip(record.programs, record.ended, strict=True))
        for at, count in sorted(ended.items())
        if count and program.name == kernel
    ]
    passed = []
    for number, at in waits:
        compiled = []

        def without(program, number=number, at=at, compiled=compiled):
            compiled.append(program)
            if len(compiled) == number + 1:
                wait = program.instructions[at]
                program.instructions[at] = dropped(wait)
                if wait.parts[0] == "mbarrier":
                    again = program.instructions[at + 1]
                    assert (again.parts[0], again.guard) == ("bra", "!complete")
                    program.instructions[at + 1] = dropped(again)

        try:
            run(gpu, gradient_form, kernel, change=without)
        except (AssertionError, FaultError):
            continue
        passed.append(f"{number} {at}: {record.programs[number].instructions[at]}")
    assert waits
    assert not passed
