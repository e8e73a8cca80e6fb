"""Which kernels the tests on a GPU launch, so that those of a family that failed `bench/smoke.py` can be left out."""

from bench.harness.failed_kernels import failed_kernels

FAMILIES = {
    "tests/bench/test_bench_mlp.py": (),
    "tests/build/test_main.py": (),
    "tests/fused/test_fused_cuda.py": ("fused-cuda",),
    "tests/fused/test_fused_gpu.py": ("fused-triton", "pointwise-cuda"),
    "tests/ops/test_cuda_kernels.py": ("pointwise-cuda",),
    "tests/ops/test_cuda_storing.py": ("pointwise-cuda",),
    "tests/ops/test_formulas.py": ("pointwise-cuda", "pointwise-triton"),
    "tests/ops/test_registration.py": ("pointwise-cuda", "pointwise-triton"),
    "tests/ops/test_triton.py": ("pointwise-triton",),
    "tests/ops/test_triton_storing.py": ("pointwise-triton",),
    "tests/stack/test_capture.py": ("pointwise-cuda",),
    "tests/stack/test_drift.py": ("pointwise-cuda",),
    "tests/stack/test_on_drift.py": ("pointwise-cuda",),
}
"""The families that the tests marked `gpu` of a file need; where the library chooses, that of its first choice."""
FAMILIES_OF_TESTS = {
    ("tests/fused/test_fused_gpu.py", "test_wide_layers"): ("wide-triton", "pointwise-cuda"),
    ("tests/fused/test_fused_gpu.py", "test_a_training_step_takes_at_most_five_states_and_the_scratch"): (
        *("fused-triton", "one-pass-triton", "pointwise-cuda"),
    ),
}
"""The families that a test needs, by its file and name, where they are not those of its file."""


def reason_to_skip(path, test):
    """Why a test marked `gpu` is left out; None if it is not. `test`: its function's name."""
    failed = failed_kernels()
    needed = [family for family in FAMILIES_OF_TESTS.get((path, test), FAMILIES.get(path, ())) if family in failed]
    return f"bench/smoke.py found that {' and '.join(needed)} fail" if needed else None
