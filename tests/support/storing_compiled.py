"""What the Triton kernels of stored increments compile to, for GPUs that need not be there.

python -m tests.support.storing_compiled   writes budgets/storing.json, for what test_triton_storing.py compiles
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from resode_cuda import stored
from resode_cuda.ops import triton as triton_ops
from tests.support.storing_cases import StoringCase, by_kernel, operands
from tests.support.triton_compiled import GPUS, compiling, resources

BUDGET = Path(__file__).parents[1] / "budgets" / "storing.json"
WHOLE, SHORT = (64, 64), (64, 70)
"""Shapes of whole groups and of short ones, for which kernels are compiled apart."""
WIDE, MIXED, NARROW, DOUBLE = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
)


@dataclass(frozen=True)
class StoringConfiguration:
    case: StoringCase
    gpu: int = 90

    def __str__(self):
        return f"sm_{self.gpu}-{self.case}"


def _configurations():
    for bits in stored.BITS:
        for pair in (WIDE, MIXED, NARROW, DOUBLE):
            yield StoringConfiguration(StoringCase("store_step", bits, pair, WHOLE, stages=2))
        for shape in (WHOLE, SHORT):
            yield StoringConfiguration(StoringCase("store", bits, WIDE, shape))
            yield StoringConfiguration(StoringCase("stored_step", bits, WIDE, shape))
        yield StoringConfiguration(StoringCase("stored_step", bits, DOUBLE, WHOLE))
    for gpu in GPUS:
        for bits, pair in ((1, MIXED), (3, NARROW), (8, DOUBLE)):
            yield StoringConfiguration(StoringCase("store_step", bits, pair, SHORT, stages=2), gpu)
            yield StoringConfiguration(StoringCase("store_step", bits, pair, WHOLE), gpu)


TESTED_STORING = [*_configurations()]


def compiled(configuration):
    """The kernel of a configuration."""
    with compiling(configuration.gpu) as kernels:
        by_kernel(triton_ops, operands(configuration.case))
    (kernel,) = kernels
    return kernel


def main():
    used = {}
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for configuration in TESTED_STORING:
            used[str(configuration)] = resources(compiled(configuration))
            print(configuration, used[str(configuration)], flush=True)
    spilled = [name for name, of in used.items() if of.pop("local")]
    lines = (f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in used.items())
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"these spill registers: {spilled or 'none'}")


if __name__ == "__main__":
    main()
