"""How backward passes are cut into slabs of rows and ranges of the depth."""

import importlib.util

import pytest
import torch

from resode_cuda.fused.slabs import SCRATCH_BYTES, slabs
from resode_cuda.fused.triton import passes as triton_passes
from tests.support.fused_cases import Case

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("wave", [128, 108 * 128, 132 * 128, 148 * 256])
def test_slabs_keep_to_their_memory(wave):
    for rows in (1, 1000, 262_144):
        for steps in (1, 64, 1000, 20_000):
            for dim in (16, 64, 256):
                step_bytes, start_bytes = 4 * dim + 4, 4 * dim
                size, length = slabs(rows, steps, step_bytes, start_bytes, 128, wave)
                assert size % 128 == 0
                assert 1 <= length <= steps
                starts = -(-steps // length) * start_bytes if length < steps else 0
                assert size * (length * step_bytes + starts) <= SCRATCH_BYTES
                assert size <= -(-rows // 128) * 128
                if wave <= size < -(-rows // 128) * 128 and length == steps:
                    assert size % wave == 0


def test_slabs_of_the_benchmark_are_whole_waves_and_go_through_the_whole_depth():
    wave, step_bytes = 132 * 2 * 64, 4 * 64 + 4
    size, length = slabs(262_144, 64, step_bytes, 4 * 64, 128, wave)
    assert (size, length) == (wave, 64)
    assert -(-262_144 // size) == 16  # waves, of 15.5 that the rows would fill
    assert slabs(262_144, 64, step_bytes, 4 * 64, 128, wave=128) == (29_184, 64)  # 18 waves: each slab takes 1.7
    assert slabs(262_144, 64, 0, 0, 128, wave) == (262_144, 64)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("dim", "kernel", "is_exact"),
    [(64, "adjoint", False), (64, "exact", True), (128, "adjoint", False), (128, "exact", True)],
)
def test_waves_are_those_of_the_compiled_code(monkeypatch, dim, kernel, is_exact):
    from tests.support import fused_compiled
    from tests.support.reckoned import programs_at_once

    monkeypatch.setattr(triton_passes, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(triton_passes.triton_ops, "most_programs", lambda device: 132 * 8)
    network, *_ = Case(dim=dim, hidden=2 * dim).operands(torch.bfloat16)
    kernels = triton_passes.TritonKernels(network, network.method())
    tile = kernels.tiles.exact if is_exact else kernels.tiles.two_pass
    reverse = "checkpoint" if is_exact else "extrapolated"
    used = fused_compiled.budget()[str(fused_compiled.Configuration(90, dim, reverse))][kernel]
    assert kernels.wave(is_exact) == 132 * programs_at_once(used, tile.warps) * tile.rows
