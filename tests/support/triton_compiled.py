"""What the Triton kernels compile to, for GPUs that need not be there, and how much of a GPU they take.

    python -m tests.support.triton_compiled           writes budgets/pointwise.json, for what test_triton.py compiles
    python -m tests.support.triton_compiled --every   compiles all that can be launched, for every GPU; takes minutes

The backend's own functions are called, with tensors on the CPU; in place of a launch, its kernel is compiled with the
types, constants and alignments that the launch would have had.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from resode_cuda.ops import triton as triton_ops
from tests.support.kernel_cases import CASES, DTYPE_PAIRS, Case, operands, pair_id

BUDGET = Path(__file__).parents[1] / "budgets" / "pointwise.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
GPUS = (80, 90, 100)
PROGRAMS = 1000


@dataclass(frozen=True)
class Configuration:
    """One launch, or two if it is deterministic."""

    case: Case
    pair: tuple[torch.dtype, torch.dtype]
    gpu: int = 90
    deterministic: bool = False

    def __str__(self):
        return f"sm_{self.gpu}-{self.case}-{pair_id(self.pair)}{'-deterministic' if self.deterministic else ''}"


def _every():
    for gpu, case, pair in itertools.product(GPUS, CASES, DTYPE_PAIRS):
        if case.op != "adjoint_update_" or pair[0] == pair[1]:
            for deterministic in (False, True) if case.op.startswith("reverse") else (False,):
                yield Configuration(case, pair, gpu, deterministic)


EVERY = list(_every())

_EULER = ("k2", "v2")
_WIDE, _MIXED, _NARROW = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)
_USUAL = [
    Case("forward_step"),
    Case("heun_step"),
    Case("reverse_update_", _EULER),
    Case("reverse_extrapolate_", _EULER),
    Case("reverse_extrapolate_"),
]
TESTED = [
    *(
        Configuration(case, pair)
        for case in _USUAL
        for pair in (_WIDE, _MIXED, _NARROW, (torch.float64, torch.float64), (torch.float64, torch.float16))
    ),
    Configuration(Case("adjoint_update_"), _WIDE),
    Configuration(Case("adjoint_update_"), _NARROW),
    Configuration(Case("reverse_extrapolate_"), _MIXED, deterministic=True),
    *(Configuration(case, pair, gpu) for gpu in (80, 100) for case in _USUAL[2:] for pair in (_MIXED, _NARROW)),
]
"""A subset of EVERY: what training uses, and the most operands there are; on sm_80 and sm_100 the usual dtypes."""


@contextmanager
def compiling(gpu):
    """The kernels that would be launched in this context, compiled for that GPU."""
    target = GPUTarget("cuda", gpu, 32)
    backend = make_backend(target)
    kernels = []

    def run(self, *args, grid, warmup, **kwargs):
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        kernels.append(triton.compile(source, target=target, options=options.__dict__))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton_ops, "most_programs", return_value=PROGRAMS),
    ):
        yield kernels


def compiled(configuration, n=4096, offset=0, **scalars):
    """The kernels of a configuration; tensors start so many values after a 16-byte boundary."""
    values = operands(configuration.case, configuration.pair, (n + offset,))._replace(**scalars)
    values = values._make(v[offset:] if isinstance(v, torch.Tensor) and len(v) > 2 else v for v in values)
    out = [torch.empty(n + offset, dtype=values[0].dtype)[offset:]] if "out" in configuration.case.written else []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(configuration.deterministic)
    try:
        with compiling(configuration.gpu) as kernels:
            getattr(triton_ops, configuration.case.op)(values, *out)
    finally:
        torch.use_deterministic_algorithms(before)
    return kernels


def resources(kernel):
    """Registers a thread, bytes of shared memory a program, and bytes of local memory a thread, where spills go."""
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {
        "registers": int(found["REG"]),
        "shared": kernel.metadata.shared,
        "local": int(found["STACK"]) + int(found["LOCAL"]),
    }


def most_resources(configuration):
    """Registers, spills and shared memory of the configuration's kernels."""
    each = [resources(kernel) for kernel in compiled(configuration)]
    return {name: max(used[name] for used in each) for name in each[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="compile every configuration, and write nothing")
    every = parser.parse_args().every
    used = {}
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for configuration in EVERY if every else TESTED:
            used[str(configuration)] = most_resources(configuration)
            print(configuration, used[str(configuration)], flush=True)
    spilled = [name for name, of in used.items() if of.pop("local")]
    if every:
        worst = max(used, key=lambda name: used[name]["registers"])
        print(f"{len(used)} configurations, {len(spilled)} spill; most registers: {worst} {used[worst]}")
    else:
        lines = (f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in used.items())
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(f"these spill registers: {spilled}" if spilled else 0)


if __name__ == "__main__":
    main()
