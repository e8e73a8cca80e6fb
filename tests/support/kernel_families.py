"""Which kernels the tests on a GPU launch, so that those of a family that failed `bench/smoke.py` can be left out."""

import os

FAILED = "FAILED_KERNELS"
"""The environment variable that names the families that failed, separated by spaces."""
FAMILIES = {
    "tests/bench/test_bench_mlp.py": (),
    "tests/build/test_main.py": (),
    "tests/fused/test_fused_cuda.py": ("fused-cuda",),
    "tests/fused/test_fused_gpu.py": ("fused-triton", "wide-triton", "pointwise-cuda"),
    "tests/ops/test_cuda_kernels.py": ("pointwise-cuda",),
    "tests/ops/test_formulas.py": ("pointwise-cuda", "pointwise-triton"),
    "tests/ops/test_registration.py": ("pointwise-cuda", "pointwise-triton"),
    "tests/ops/test_triton.py": ("pointwise-triton",),
    "tests/stack/test_capture.py": ("pointwise-cuda",),
    "tests/stack/test_drift.py": ("pointwise-cuda",),
    "tests/stack/test_on_drift.py": ("pointwise-cuda",),
}
"""The families that the tests marked `gpu` of a file need; where the library chooses, that of its first choice."""


def reason_to_skip(path):
    """Why the tests marked `gpu` of a file are left out; None if they are not."""
    failed = os.environ.get(FAILED, "").split()
    needed = [family for family in FAMILIES.get(path, ()) if family in failed]
    return f"bench/smoke.py found that {' and '.join(needed)} fail" if needed else None
