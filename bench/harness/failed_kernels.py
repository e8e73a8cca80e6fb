"""The families of kernels that failed `bench/smoke.py`, as `bench/gpu.sh` hands them on to what it runs afterwards."""

import os

VARIABLE = "FAILED_KERNELS"
"""The environment variable that names the families, separated by spaces."""
ONE_PASS_FAMILY = "one-pass-triton"
"""Triton's adjoint whose state pass adds the gradients up: all that needs it can do without."""


def failed_kernels() -> list[str]:
    return os.environ.get(VARIABLE, "").split()
