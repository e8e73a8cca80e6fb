"""In the place of launches of Triton's kernels: they are compiled for a GPU, and run by the machine."""

from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from .assembly import read
from .copies import TensorMap
from .machine import Launch, Machine
from .memory import GlobalMemory


@contextmanager
def executing(gpu, late=False, change=lambda name, text: text):
    """Launches in this context are executed on the memory of CPU tensors, as compiled for that GPU.

    late: whether copies and products end only where they are waited for. change: of a kernel's name and PTX, the PTX
    that is executed. Gives a list that is filled with the names of the kernels that ran.
    """
    target = GPUTarget("cuda", gpu, 32)
    backend = make_backend(target)
    machines, ran = {}, []

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
            program = read(change(kernel.__name__, compiled.asm["ptx"]))
            machines[key] = Machine(program), signature, compiled.metadata
        machine, signature, metadata = machines[key]
        tensors, arguments, maps = _arguments(bound.values(), signature.values(), metadata.tensordesc_meta)
        # After its arguments a kernel takes the addresses of memory of its own, of which ours have none.
        arguments += [0] * (len(machine.program.parameters) - len(arguments))
        launch = Launch(grid, metadata.shared, GlobalMemory(tensors), arguments, maps, late)
        machine.run(launch)
        ran.append(kernel.__name__)

    with (
        mock.patch.object(JITFunction, "run", run),
        # The machine needs no machine code, which takes as long to make as all that comes before.
        mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""),
    ):
        yield ran


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
        elif isinstance(value, float):
            raise NotImplementedError(f"a parameter that is a number: {value}")
        else:
            arguments.append(int(value))

    for value, type_ in zip(values, types, strict=True):
        add(value, type_)
    return tensors, arguments, maps
