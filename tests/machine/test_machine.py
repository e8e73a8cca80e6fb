"""The PTX machine itself, on a few lines of PTX whose results are known."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from collections import Counter

from tests.support.ptx.arithmetic import LARGEST_ERRORS, from_bf16, to_bf16, to_f16
from tests.support.ptx.assembly import read
from tests.support.ptx.faults import FaultError, UnknownInstructionError
from tests.support.ptx.machine import Launch, Machine
from tests.support.ptx.memory import GlobalMemory

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
"""
STORE = "st.global.b32 [%rd2], %r2; ret;"


def run(code, tensor, shared_bytes=256, grid=(1,), late=True, threads=32):
    machine = Machine(read(HEAD.replace(".reqntid 32", f".reqntid {threads}") + code + "\n}\n"))
    arguments = [tensor.data_ptr(), 0]
    machine.run(Launch(grid, shared_bytes, GlobalMemory([tensor]), arguments, {}, late, Counter()))
    return tensor


def integers(code, **how):
    return run(code, torch.zeros(32, dtype=torch.int32), **how).tolist()


def test_threads_have_numbers_and_registers_of_their_own():
    assert integers("shl.b32 %r2, %r1, 1; add.s32 %r2, %r2, 1;" + STORE) == [2 * i + 1 for i in range(32)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("mov.b32 %r3, -7; div.s32 %r2, %r3, 2;", -3),
        ("mov.b32 %r3, -7; rem.s32 %r2, %r3, 2;", -1),
        ("mov.b32 %r3, -8; shr.s32 %r2, %r3, 1;", -4),
        ("mov.b32 %r3, 0x12345678; bfe.u32 %r2, %r3, 8, 12;", 0x456),
        ("mov.b32 %r3, 0x00000800; bfe.s32 %r2, %r3, 8, 4;", -8),
        ("mov.b32 %r3, 0x33221100; mov.b32 %r4, 0x77665544; prmt.b32 %r2, %r3, %r4, 0x7410;", 0x77441100),
        ("mov.b32 %r3, 0x80; prmt.b32 %r2, %r3, %r3, 0x8888;", -1),
        ("mov.b32 %r3, 0fBFC00000; cvt.rzi.s32.f32 %r2, %r3;", -1),
        ("mov.b32 %r3, 0f7FC00000; cvt.rzi.s32.f32 %r2, %r3;", 0),
        ("mov.b32 %r3, 0f7F800000; cvt.rzi.s32.f32 %r2, %r3;", 2**31 - 1),
        ("mov.b32 %r3, 300; cvt.u16.u32 %rs1, %r3; cvt.s8.s32 %rs2, %r3; cvt.u32.u16 %r2, %rs2;", 44),
        ("mov.b32 %r3, 200; cvt.s8.s32 %rs2, %r3; cvt.s32.s16 %r2, %rs2;", -56),
        ("mov.b32 %r3, {%rs1, %rs2}; mov.b32 {%rs3, %rs4}, 0x00050003; cvt.u32.u16 %r2, %rs4;", 5),
        ("setp.lt.u32 %p1, %r1, 32; selp.b32 %r2, 5, 6, %p1;", 5),
        ("mov.b32 %r3, 0f7FC00000; setp.ltu.f32 %p1, %r3, 0f00000000; selp.b32 %r2, 1, 0, %p1;", 1),
        ("mov.b32 %r3, 0f7FC00000; setp.ne.f32 %p1, %r3, 0f00000000; selp.b32 %r2, 1, 0, %p1;", 0),
        ("mov.b32 %r3, 0f7FC00000; max.f32 %r2, %r3, 0f3F800000;", 0x3F800000),
        ("mov.b16 %rs1, 0xBC00; mov.b16 %rs2, 0; setp.le.f16 %p1, %rs1, %rs2; selp.b32 %r2, 1, 0, %p1;", 1),
        ("mov.b32 %r3, 0x0000BF80; setp.lt.bf16x2 %p1|%p2, %r3, 0; selp.b32 %r2, 1, 0, %p1;", 1),
        ("mov.b32 %r3, 0x0000BF80; setp.lt.bf16x2 %p1|%p2, %r3, 0; selp.b32 %r2, 1, 0, %p2;", 0),
    ],
)
def test_instructions(code, expected):
    assert integers(code + STORE) == [expected] * 32


def test_threads_take_different_branches_and_meet_again():
    code = """
        setp.lt.u32 %p1, %r1, 5;
        mov.b32 %r2, 1;
        @%p1 bra FEW;
        mov.b32 %r2, 2;
        bra.uni BOTH;
    FEW:
        add.s32 %r2, %r2, 10;
    BOTH:
        bar.sync 0;
    """
    assert integers(code + STORE) == [11] * 5 + [2] * 27


def test_threads_leave_a_loop_one_after_the_other():
    code = """
        mov.b32 %r2, 0;
    AGAIN:
        add.s32 %r2, %r2, 3;
        setp.lt.u32 %p1, %r2, %r1;
        @%p1 bra AGAIN;
        bar.sync 0;
    """
    assert integers(code + STORE) == [max(3, -(-i // 3) * 3) for i in range(32)]


def test_programs_that_part_go_on_by_themselves():
    code = """
        mov.u32 %r3, %ctaid.x;
        mov.b32 %r2, 7;
        setp.eq.u32 %p1, %r3, 1;
        @%p1 bra LAST;
        mov.b32 %r2, 8;
    LAST:
        mad.lo.s32 %r4, %r3, 32, %r1;
        mad.wide.u32 %rd2, %r4, 4, %rd1;
    """
    assert run(code + STORE, torch.zeros(96, dtype=torch.int32), grid=(3,)).tolist() == [8] * 32 + [7] * 32 + [8] * 32


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("st.global.b32 [%rd2+4], %r1; ret;", "in none of"),
        ("st.global.b32 [%rd2+2], %r1; ret;", "not aligned"),
        ("st.global.v2.b32 [%rd2], {%r1, %r1}; ret;", "not aligned"),
        ("mov.b32 %r3, global_smem; mad.lo.s32 %r3, %r1, 16, %r3; ld.shared.b32 %r2, [%r3]; ret;", "are not within"),
        ("ld.shared.b32 %r2, [%r1]; ret;", "not aligned"),
        ("@%p1 bra X; mov.b32 %r2, 1; X: add.s32 %r3, %r2, 1; setp.eq.u32 %p1, %r1, 1; ret;", "before it has a value"),
        ("setp.eq.u32 %p1, %r1, 1; @%p1 bra X; bar.sync 0; X: ret;", "a barrier that some threads miss"),
        ("mov.b32 %r3, 64; mbarrier.init.shared::cta.b64 [%r3], 1; ret;", "is in use"),
        ("X: bra.uni X;", "runs for ever"),
    ],
)
def test_faults(code, reason, monkeypatch):
    monkeypatch.setattr("tests.support.ptx.machine.MOST_INSTRUCTIONS", 1000)
    with pytest.raises(FaultError, match=reason):
        run(code, torch.zeros(32, dtype=torch.int32))


@pytest.mark.parametrize(
    "code",
    [
        "vadd4.u32.u32.u32 %r2, %r1, %r1, %r1",
        "add.sat.s32 %r2, %r1, %r1",
        "add.rz.f32 %r2, %r1, %r1",
        "min.xorsign.abs.f32 %r2, %r1, %r1",
        "cvt.rn.relu.bf16x2.f32 %r2, %r1, %r1",
        "cvt.rn.satfinite.f16.f32 %rs2, %r1",
        "mul.hi.s32 %r2, %r1, %r1",
        "bfe.u32 %r2, %r1, %r1, 4",
        "bar.sync 1",
        "bar.arrive 1, 64",
        "fence.proxy.async.global",
        "setp.eq.u32 %p1, %r1, 0; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r3]",
    ],
)
def test_what_has_no_meaning_is_told(code):
    with pytest.raises(UnknownInstructionError):
        run(f"mov.b32 %r3, 0; {code}; ret;", torch.zeros(32))


COPY = """
    mad.lo.s32 %r3, %r1, 4, 0;
    mov.b32 %r4, 0;
    st.shared.b32 [%r3], %r4;
    cp.async.ca.shared.global [%r3], [%rd2], 0x4;
    cp.async.commit_group;
    WAIT
    ld.shared.b32 %r2, [%r3];
    add.s32 %r2, %r2, 1;
"""


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_is_there_when_it_was_waited_for(late):
    code = COPY.replace("WAIT", "cp.async.wait_group 0;") + STORE
    assert run(code, torch.arange(32, dtype=torch.int32), late=late).tolist() == list(range(1, 33))


def test_a_copy_that_nobody_waited_for_is_a_fault_only_where_it_is_late():
    code = COPY.replace("WAIT", "cp.async.wait_group 1;") + STORE
    assert run(code, torch.arange(32, dtype=torch.int32), late=False).tolist() == list(range(1, 33))
    with pytest.raises(FaultError, match="on its way"):
        run(code, torch.arange(32, dtype=torch.int32), late=True)


STORE_AND_LOAD = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r1;
    MEET
    xor.b32 %r4, %r3, OTHER;
    ld.shared.b32 %r2, [%r4];
"""


@pytest.mark.parametrize("other", [4, 128], ids=["within a warp", "across warps"])
def test_threads_of_several_warps_must_meet_before_they_read_what_others_wrote(other):
    code = STORE_AND_LOAD.replace("OTHER", str(other)) + STORE
    tensor = torch.zeros(64, dtype=torch.int32)
    expected = [i ^ (other // 4) for i in range(64)]
    assert run(code.replace("MEET", "bar.sync 0;"), tensor, threads=64).tolist() == expected
    for meeting in ("", "bar.warp.sync -1;"):
        if other == 4:
            assert run(code.replace("MEET", meeting), tensor, threads=64).tolist() == expected
        else:
            with pytest.raises(FaultError, match="read what another has just written"):
                run(code.replace("MEET", meeting), tensor, threads=64)


def test_conversions_to_16_bits_are_torch_s():
    values = torch.cat([torch.randn(1000) * 10.0**k for k in range(-9, 9)] + [torch.tensor([0.0, -0.0, 1e38, 3.4e38])])
    values = torch.cat([values, torch.tensor([float("inf"), -float("inf"), 65519.0, 65520.0, 2.0**-25])])
    for dtype, convert in ((torch.bfloat16, to_bf16), (torch.float16, to_f16)):
        with np.errstate(over="ignore"):
            bits = convert(values.numpy())
        assert np.array_equal(bits.view(np.int16), values.to(dtype).view(torch.int16).numpy())
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32))))[0]


def test_truncation_goes_towards_zero():
    values = np.array([1.0078, -1.0078, 3.999], np.float32)
    assert from_bf16(to_bf16(values, "rz")).tolist() == [1.0, -1.0, 3.984375]
    with np.errstate(over="ignore"):
        assert to_f16(np.array([1.0009, -1.0009], np.float32), "rz").view(np.float16).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_approximate_instructions_are_off_by_what_they_may_be(instruction, function):
    tensor = torch.linspace(0.1, 3, 32)
    exact = function(tensor.double().numpy())
    run(f"ld.global.b32 %r3, [%rd2]; {instruction} %r2, %r3;" + STORE, tensor)
    errors = np.abs(tensor.double().numpy() / exact - 1)
    allowed = LARGEST_ERRORS[instruction.split(".")[0]]
    assert 0.5 * allowed <= errors.max() <= 1.001 * allowed + 2.0**-24


def test_a_fused_multiply_add_rounds_once():
    a, b = 1 + 2.0**-12, 1 - 2.0**-12
    tensor = torch.full((32,), a)
    code = f"""
        ld.global.b32 %r3, [%rd2];
        mov.b32 %r4, 0f{np.float32(b).view(np.uint32):08X};
        fma.rn.f32 %r2, %r3, %r4, 0fBF800000;
    """
    assert run(code + STORE, tensor).tolist() == [-(2.0**-24)] * 32
