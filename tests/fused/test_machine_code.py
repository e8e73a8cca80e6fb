"""The reader of machine code, on listings by hand and on a kernel, and what is reckoned from it."""

import importlib.util

import pytest

pytestmark = [
    pytest.mark.usefixtures("triton_cache"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
if importlib.util.find_spec("triton") is not None:
    from resode_cuda.fused.triton.tiles import Tile
    from tests.support import reckoned
    from tests.support.fused_compiled import Configuration, compiled
    from tests.support.machine_code import MachineCode


def listing(text):
    """Lines as the disassembler prints them: an address, a predicate, an instruction."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/   {line} ;" for place, line in enumerate(lines)
    )


LAYERS = listing("""
    kernel:
    S2R R0, SR_TID.X
    .L_layer:
    LDL R4, [R1]
    @!P1 BRA `(.L_after)
    .L_chunk:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R2
    @!P4 BRA `(.L_wait)
    .L_arrived:
    HGMMA.64x64x16.F32.BF16 R24, R84, gdesc[UR16], R24
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], gdesc[UR16], R24, gsb0
    MUFU.EX2 R5, R5
    STL [R1+0x8], R5
    FFMA R5, R5, R6, R7
    @P0 BRA `(.L_chunk)
    .L_after:
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDS.128 R8, [R9]
    BRA.U !UP0, `(.L_layer)
    EXIT
    .L_wait:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R2
    @!P4 BRA `(.L_wait)
    BRA `(.L_arrived)
    .L_end:
    BRA `(.L_end)
""")


def test_loops_are_found_and_code_that_waits_elsewhere_is_none_around():
    code = MachineCode(LAYERS)
    first = [code.blocks[loop.header][0].name for loop in code.loops]
    assert first == ["LDL", "SYNCS", "SYNCS"]  # layers, chunks, waiting; what follows the end is never reached
    layers, chunks, waiting = code.loops
    assert waiting.blocks < chunks.blocks < layers.blocks
    assert code.matrix_loops == [chunks]
    assert code.around(chunks) is layers
    assert code.around(layers) is None


def test_instructions_are_counted_by_kind_within_a_loop_and_outside():
    code = MachineCode(LAYERS)
    layers, chunks, _ = code.loops
    inside = code.counts(chunks.blocks)
    assert inside == {"matrix": 2, "special": 1, "fp32": 1, "local": 1, "other": 6}
    assert code.counts(layers.blocks - chunks.blocks) == {"local": 1, "shared": 1, "other": 3}
    assert code.counts().total() == 19
    assert code.inner_local == 1


def test_code_without_a_matrix_loop_has_no_inner_one():
    code = MachineCode(listing("kernel:\n.L_a:\nFADD R0, R0, R1\nSTL [R1], R0\n@P0 BRA `(.L_a)\nEXIT"))
    assert len(code.loops) == 1
    assert code.matrix_loops == []
    assert code.inner_local == 0


def test_a_branch_into_a_loop_makes_it_none():
    """Two ways in: no block that all ways to the branch back pass through."""
    code = MachineCode(
        listing("k:\n@P1 BRA `(.L_b)\n.L_a:\nHMMA.16816.F32 R0, R4, R8, R0\n.L_b:\n@P0 BRA `(.L_a)\nEXIT")
    )
    assert code.loops == []


@pytest.mark.parametrize("gpu", [80, 90, 100])
def test_a_kernel_has_a_loop_over_chunks_within_that_over_layers(gpu):
    kernel = dict(compiled(Configuration(gpu, 64, "extrapolated")))["adjoint_kernel"]
    code = MachineCode.of(kernel)
    (chunks,) = code.matrix_loops
    layers = code.around(chunks)
    assert layers is not None
    inside, outside = code.counts(chunks.blocks), code.counts(layers.blocks - chunks.blocks)
    assert inside["matrix"] >= 4
    assert inside["special"] >= 2
    # For sm_100 products of the first and the last chunk are taken out of the loop.
    assert gpu == 100 or outside["matrix"] == 0
    assert code.counts().total() > 1000


def test_what_is_reckoned_of_a_layer():
    """Each of four warps issues 8 instructions for each of two chunks, 3 where it waits and 5 around, for 64 rows."""
    used = {"registers": 168, "shared": 60_000}
    found = reckoned.reckon("two_pass", MachineCode(LAYERS), used, Tile(64, 64, 4), 128)
    assert found.programs == 3
    assert found.units["issued"] == 2 * 4 * (2 * 8 + 3 + 5) / 4
    assert found.units["special"] == 2 * 4 * 2 * 2
    # Two products of 64 x 64 x 16 for each chunk, of which one reads both operands from shared memory.
    assert found.units["matrix"] == 2 * 2 * 2 * (2 * 64 * 64 * 16) / 4096
    words = 2 * 4 * 128 * (2 + 1)  # STL in each chunk, LDL
    assert found.units["shared"] == (2 * 2 * (2 * 2 * 16 * 64 + 2 * 16 * 64) + 2 * 4 * 512 + words) / 128
    assert found.cycles == max(found.busiest, found.alone / 3)
