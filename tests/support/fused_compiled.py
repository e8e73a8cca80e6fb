"""What the depth-fused Triton kernels compile to, for GPUs that need not be there, and how much of a GPU they take.

Registers a thread, bytes of shared memory a program, bytes of local memory a thread, and "inner_local": the
instructions of innermost matrix loops that load from or store to local memory.

    python -m tests.support.fused_compiled            writes budgets/fused.json, for what test_fused_triton.py compiles
    python -m tests.support.fused_compiled --only X   the configurations whose name contains X, and writes nothing

As in `triton_compiled.py`, the backend's own functions are called with tensors on the CPU, and what they would launch
is compiled instead.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from resode_cuda.fused.signature import Wanted
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.ops import triton as triton_ops
from resode_cuda.reverse import PRESETS
from tests.support import evidence
from tests.support.machine_code import MachineCode
from tests.support.stepped_network import SteppedNetwork
from tests.support.triton_compiled import PROGRAMS, compiling, resources

BUDGET = Path(__file__).parents[1] / "budgets" / "fused.json"
GPUS = (80, 90, 100)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may have."""
STEPS = 5
SIZES = {16: 64, 32: 64, 64: 128, 128: 512, 256: 512, 2048: 512}
"""Dims with a hidden size each: it is walked through in chunks, whatever it is."""


@dataclass(frozen=True)
class Configuration:
    """A training step's launches."""

    gpu: int
    dim: int
    reverse: str  # a preset, or "checkpoint"
    scheme: str = "euler"
    activation: str = "silu"
    norm: str | None = None
    dtype: torch.dtype = torch.bfloat16
    deterministic: bool = False
    gradient_form: str = "two_pass"

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"sm_{self.gpu}", str(self.dim), self.reverse, self.scheme, self.activation, self.norm, dtype]
        parts += [
            self.gradient_form if self.gradient_form != "two_pass" else None,
            "deterministic" if self.deterministic else None,
        ]
        return "-".join([part for part in parts if part])


def compiled(configuration):
    """Name and kernel of each launch."""
    with compiling(configuration.gpu) as kernels:
        names = _train(configuration)
    return list(zip(names, kernels, strict=True))


@dataclass
class Launch:
    """What a kernel would be launched with. key: what Triton would look it up by among those that it has compiled."""

    kernel: JITFunction
    values: tuple
    constants: dict
    key: str

    @property
    def config(self):
        return self.constants["CONFIG"]


def launches(configuration):
    """The launches themselves."""
    found = []

    def run(self, *args, grid, warmup, **kwargs):
        found.append(Launch(self, args, kwargs, key_of(self, args, kwargs, configuration.gpu)))

    with mock.patch.object(JITFunction, "run", run):
        _train(configuration)
    return found


def key_of(kernel, values, constants, gpu):
    backend = make_backend(GPUTarget("cuda", gpu, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = binder(*values, **constants)
    return compute_cache_key(_KEYS, specialization, options)


_KEYS = {}
"""Triton's own first look: by hash and equality of all that a kernel is specialised on."""


def _train(configuration):
    """Launch a training step's kernels, by `JITFunction.run`; their names."""
    c = configuration
    steps, rows, hidden = STEPS, 256, SIZES[c.dim]
    layers = steps + (c.scheme == "heun")
    shapes = (layers, hidden, c.dim), (layers, hidden), (layers, c.dim, hidden), (layers, c.dim)
    parameters = [torch.zeros(shape, dtype=c.dtype) for shape in shapes]
    network = SteppedNetwork(*parameters, c.activation, c.norm, c.scheme, (1 / steps,) * steps)
    x = torch.zeros(rows, c.dim)
    names = []

    def getitem(kernel, grid):
        names.append(kernel.__name__)
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=False, **kwargs)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(c.deterministic)
    try:
        with (
            mock.patch.object(triton_passes, "capability_of", return_value=divmod(c.gpu, 10)),
            mock.patch.object(triton_passes, "gradient_form", return_value=c.gradient_form),
            mock.patch.object(triton_ops, "most_programs", return_value=PROGRAMS),
            mock.patch.object(JITFunction, "__getitem__", getitem),
        ):
            if c.reverse == "checkpoint":
                triton_passes.exact_adjoint(network, network.method(), x, x, True)
            else:
                method = network.method(PRESETS[c.reverse])
                states = triton_passes.forward(network, method, x)
                triton_passes.adjoint(network, method, x, states, Wanted(parameters=True))
    finally:
        torch.use_deterministic_algorithms(before)
    return names


def source():
    """A digest of the kernels' code and of the compiler's version."""
    kernels = [f"{kernel} {digest}" for (backend, kernel), digest in evidence.sources().items() if backend == "triton"]
    return hashlib.sha256("\n".join([triton.__version__, *sorted(kernels)]).encode()).hexdigest()[:12]


def budget():
    """By configuration and kernel, what fused.json has."""
    return {name: used for name, used in json.loads(BUDGET.read_text()).items() if name != "source"}


def used_by(configuration):
    """What each kernel takes of a GPU, and how often it spills where that costs most: in its innermost matrix loops.

    Of a kernel that is compiled in several ways, the most of each.
    """
    found = {}
    for name, kernel in compiled(configuration):
        used = resources(kernel) | {"inner_local": MachineCode.of(kernel).inner_local}
        before = found.setdefault(name.removesuffix("_kernel"), used)
        before.update({what: max(figure, before[what]) for what, figure in used.items()})
    return found


def _tested():
    for gpu, dim in itertools.product(GPUS, list(SIZES)[:-1]):
        yield Configuration(gpu, dim, "extrapolated")
        yield Configuration(gpu, dim, "checkpoint")
    for gpu, dim in itertools.product(GPUS[1:], (16, 64)):
        yield Configuration(gpu, dim, "extrapolated", gradient_form="one_pass")
    for gpu, dim in itertools.product((*GPUS, 120), (64, 128, 256)):
        yield Configuration(gpu, dim, "stored")
    for gpu in GPUS[1:]:
        yield Configuration(gpu, 64, "stored", gradient_form="one_pass")
    for dim in (64, 128):
        yield Configuration(120, dim, "extrapolated")
    for gpu in (86, 120):  # with the least shared memory
        for reverse in ("extrapolated", "checkpoint", "stored"):
            yield Configuration(gpu, 128, reverse, scheme="heun", norm="layer", dtype=torch.float32)
            yield Configuration(gpu, 256, reverse, scheme="heun", norm="layer")
    for gpu in GPUS[1:]:
        yield Configuration(gpu, 256, "extrapolated", scheme="heun", norm="layer")
        yield Configuration(gpu, 256, "checkpoint", scheme="heun", norm="layer")
    for gpu in GPUS:  # beyond what is kept on chip
        yield Configuration(gpu, 2048, "extrapolated", norm="layer")
        yield Configuration(gpu, 2048, "stored", norm="layer")
    for dim in (64, 128):
        for reverse in ("corrected", "paper"):
            yield Configuration(90, dim, reverse)
        yield Configuration(90, dim, "stored", dtype=torch.float32)
        yield Configuration(90, dim, "stored", scheme="heun", norm="rms")
        yield Configuration(90, dim, "extrapolated", activation="gelu_tanh")
        yield Configuration(90, dim, "extrapolated", deterministic=True, activation="gelu", norm="layer")
        yield Configuration(90, dim, "corrected", scheme="heun", norm="rms")
        yield Configuration(90, dim, "extrapolated", dtype=torch.float32)
        yield Configuration(90, dim, "extrapolated", dtype=torch.float16, activation="gelu")


TESTED = list(_tested())
EVERYDAY = [
    Configuration(80, 64, "extrapolated"),
    Configuration(90, 16, "checkpoint"),
    Configuration(90, 64, "extrapolated"),
    Configuration(90, 64, "extrapolated", gradient_form="one_pass"),
    Configuration(90, 128, "extrapolated"),
    Configuration(90, 64, "stored"),
    Configuration(100, 64, "stored"),
    Configuration(120, 64, "extrapolated"),
    Configuration(90, 2048, "extrapolated", norm="layer"),
]
"""A part of TESTED that is compiled whatever has changed: all, with `make machine`, once the kernels' code has."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="X")
    only = parser.parse_args().only
    found = {}
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for configuration in TESTED:
            if only in str(configuration):
                found[str(configuration)] = used_by(configuration)
                for name, used in found[str(configuration)].items():
                    print(f"{configuration!s:45} {name:16} {used}", flush=True)
    if not only:
        lines = (f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in found.items())
        BUDGET.write_text("{\n" + ",\n".join([f'  "source": "{source()}"', *lines]) + "\n}\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
