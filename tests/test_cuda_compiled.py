"""The CUDA kernels as nvcc compiles them: within their budget of registers, and by accesses of 16 bytes."""

import json
import re

import cuda_compiled
import pytest

pytestmark = pytest.mark.skipif(cuda_compiled.NVCC is None, reason="nvcc is not on PATH")

# Pointers that are read in packs of 16 bytes and of the stages' 16 bytes or less, and those written: both stages and
# both products are there or are tested for.
ACCESSES = {
    "step_kernel": (1, 2, 1),
    "reverse_kernel<false": (5, 2, 2),
    "reverse_kernel<true": (6, 2, 4),
    "adjoint_kernel": (3, 0, 1),
}


@pytest.mark.parametrize("gpu", cuda_compiled.GPUS)
def test_kernels_stay_within_their_budget(gpu):
    used = cuda_compiled.resources(gpu)
    budget = json.loads(cuda_compiled.BUDGET.read_text())[f"sm_{gpu}"]
    assert set(used) == set(budget)
    assert [name for name, of in used.items() if of["local"]] == [], "registers are spilled"
    above = {name: (of["registers"], budget[name]) for name, of in used.items() if of["registers"] > budget[name]}
    assert above == {}, "(registers, budget); if it must be, run tests/cuda_compiled.py"


@pytest.mark.parametrize("source", cuda_compiled.SOURCES)
def test_accesses_are_wide(source):
    """Where all types have 16 bits the compiler can't tell packs of x from those of k: they count together."""
    for name, ptx in cuda_compiled.bodies(source, 90).items():
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
