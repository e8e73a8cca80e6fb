"""In the place of launches of Triton's kernels: they are compiled for a GPU, and run by the machine."""

import struct
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from .assembly import Program, read
from .copy_engine import TensorMap
from .machine import Launch, Machine
from .memory import GlobalMemory


@dataclass
class Record:
    """What ran: programs in the order in which they were compiled, and how much ended at each one's instructions."""

    programs: list[Program] = field(default_factory=list)
    ended: list[Counter] = field(default_factory=list)


stands_for: int | None = None
"""The GPU for which unspoiled kernels are being executed."""


@contextmanager
def executing(gpu, late=False, change=None):
    """Launches in this context are executed on the memory of CPU tensors, as compiled for that GPU.

    late: whether copies and products end only where they are waited for. change: of a program, to spoil it before it
    runs. Gives the record of what runs.
    """
    target = GPUTarget("cuda", gpu, 32)
    backend = make_backend(target)
    machines, record = {}, Record()

    def run(kernel, *values, grid, warmup, **constants):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*values, **constants)
        key = kernel, str(specialization), str(options)
        if key not in machines:
            options, signature, constants, attributes = kernel._pack_args(
                backend, constants, bound, specialization, options
            )
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=target, options=options.__dict__)
            program = read(compiled.asm["ptx"])
            if change:
                change(program)
            machines[key] = Machine(program), signature, compiled.metadata, Counter()
            record.programs.append(program)
            record.ended.append(machines[key][-1])
        machine, signature, metadata, ended = machines[key]
        tensors, arguments, maps = _arguments(bound.values(), signature.values(), metadata.tensordesc_meta)
        # After its arguments a kernel takes the addresses of memory of its own, of which ours have none.
        arguments += [0] * (len(machine.program.parameters) - len(arguments))
        machine.run(Launch(grid, metadata.shared, GlobalMemory(tensors), arguments, maps, late, ended))

    with (
        mock.patch.object(JITFunction, "run", run),
        # The machine needs no machine code, which takes as long to make as all that comes before.
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
    ):
        global stands_for
        before, stands_for = stands_for, None if change else gpu
        try:
            yield record
        finally:
            stands_for = before


_REAL = {"fp32": "<f", "fp64": "<d"}


def _arguments(values, types, descriptions):
    """(the tensors, the bits of each parameter, the tensor maps by the number of their parameter)"""
    tensors, arguments, maps = [], [], {}
    descriptions = iter(descriptions or [])

    def add(value, type_):
        if isinstance(type_, tuple):
            for each, of_each in zip(value, type_, strict=True):
                add(each, of_each)
        elif type_ == "constexpr":
            return
        elif isinstance(value, TensorDescriptor):
            description = next(descriptions)
            tensors.append(value.base)
            maps[len(arguments)] = TensorMap(value.base, description["block_size"], description["swizzle"])
            arguments.extend([0, *value.shape, *value.strides])
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
            arguments.append(value.data_ptr())
        elif type_ in _REAL:
            arguments.append(int.from_bytes(struct.pack(_REAL[type_], value), "little"))
        else:
            arguments.append(int(value))

    for value, type_ in zip(values, types, strict=True):
        add(value, type_)
    return tensors, arguments, maps
