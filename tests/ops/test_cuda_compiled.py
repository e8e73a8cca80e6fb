"""The CUDA kernels as nvcc compiles them: within their budget of registers, and by accesses of 16 bytes."""

import functools
import json
import re

import pytest

from tests.support import cuda_compiled
from tests.support.once import once

pytestmark = pytest.mark.skipif(cuda_compiled.NVCC is None, reason="nvcc is not on PATH")

# Pointers that are read in packs of 16 bytes and of the stages' 16 bytes or less, and those written: both stages and
# both products are there or are tested for.
ACCESSES = {
    "step_kernel": (1, 2, 1),
    "reverse_kernel<false": (5, 2, 2),
    "reverse_kernel<true": (6, 2, 4),
    "adjoint_update_kernel": (3, 0, 1),
    # The companion; a thread's four values of a 16-bit state are 8 bytes.
    "store_kernel": (1, 0, 1),
    "stored_step_kernel": (1, 0, 1),
}
EIGHT_STATES = "mlp_adjoint_kernel<float, 128>"
"""They have 16 values a thread each: 24 bytes of them at most wait in local memory on sm_80."""
STEPS = {f"step_kernel<{pair}>" for pair in ("float, float", "double, float", "double, double")}
"""On sm_120 six blocks of them leave a thread 40 registers, of which the compiler wants a few more."""


@pytest.fixture(scope="session")
def compiled(shared_folder):
    """From a source and a GPU, the folder with what nvcc makes of it, for all tests that ask for both."""

    def folder_of(source, gpu):
        folder = shared_folder / "cuda_compiled" / f"sm_{gpu}" / source
        return once(folder, functools.partial(cuda_compiled.compile_source, source, gpu))

    return folder_of


@pytest.mark.parametrize("source", cuda_compiled.POINTWISE + cuda_compiled.FUSED)
@pytest.mark.parametrize("gpu", cuda_compiled.GPUS)
def test_kernels_stay_within_their_budget(compiled, gpu, source):
    used = cuda_compiled.resources(compiled(source, gpu))
    budget = json.loads(cuda_compiled.BUDGET.read_text())[f"sm_{gpu}"]
    assert used
    assert set(used) <= set(budget)
    above = {}
    for name, figures in used.items():
        allowed = budget[name] if isinstance(budget[name], dict) else {"registers": budget[name], "local": 0}
        above |= {f"{name} {what}": (figures[what], most) for what, most in allowed.items() if figures[what] > most}
    assert above == {}, "(used, budget); if it must be, run python -m tests.support.cuda_compiled"


def test_few_kernels_spill_registers():
    for gpu, kernels in json.loads(cuda_compiled.BUDGET.read_text()).items():
        spilling = {name for name, figures in kernels.items() if isinstance(figures, dict)}
        assert spilling <= {"sm_80": {EIGHT_STATES}, "sm_120": STEPS}.get(gpu, set()), gpu


@pytest.mark.parametrize("source", cuda_compiled.POINTWISE)
def test_accesses_are_wide(compiled, source):
    """Packs of x and of k count together where all types have 16 bits: the compiler can't tell them apart."""
    for name, ptx in cuda_compiled.bodies(compiled(source, 90)).items():
        kind = next((kind for kind in ACCESSES if name.startswith(kind)), None)
        if kind is None:
            continue
        states, stages, written = ACCESSES[kind]
        types = re.findall(r"double|float|__half|__nv_bfloat16", name)
        narrow = len(types) == 2 and types[0] != types[1]
        loads = len(re.findall(r"\bld\.global(?:\.nc)?\.(?:v4\.[fbu]32|v2\.[fbu]64)", ptx))
        stores = len(re.findall(r"\bst\.global\.(?:v4\.[fbu]32|v2\.[fbu]64)", ptx))
        assert loads >= states + (0 if narrow else stages), name
        assert stores >= written, name


@pytest.mark.parametrize("source", cuda_compiled.FUSED)
def test_pairs_are_not_stored_by_bytes(compiled, source):
    """As they are where the compiler does not know how a pair is aligned."""
    for name, ptx in cuda_compiled.bodies(compiled(source, 90)).items():
        assert not re.findall(r"\bst\.[\w.]*(?:u8|b8|s8)\b", ptx), name
