"""`python -m resode_cuda`: what is installed, which backends run where, and what the kernels take of a GPU; with
`diagnose` the diagnosis of a model."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import signal
from collections.abc import Iterator, Sequence

import torch

from . import __version__, backends, library, ops
from .diagnosis import command_line

HARDWARE = "compiled, not yet run on hardware"
"""How far the kernels have been tested, until results measured on a GPU are in bench/results."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m resode_cuda",
        description="Prints versions, devices, how the compiled library was built, the backends of each op and, on a "
        "machine with a GPU and the library, what each kernel takes of it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="diagnose")
    command_line.add_arguments(commands.add_parser("diagnose", help="look at a model: `resode_cuda.diagnose`"))
    options = parser.parse_args(arguments)
    if options.command == "diagnose":
        command_line.run(options)
        return
    for line in (*_versions(), *_devices(), *_library(), *_backends(), *_kernels()):
        print(line)


def _versions() -> Iterator[str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    versions = {
        "resode_cuda": __version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": triton,
        "python": f"{platform.python_version()}, {platform.platform()}",
    }
    for name, version in versions.items():
        yield f"{name:12}{version}"


def _devices() -> Iterator[str]:
    yield ""
    if not torch.cuda.is_available():
        yield "devices: torch finds no CUDA device"
        return
    yield "devices"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield (
            f"  cuda:{index}   {device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.1f} GiB, {device.multi_processor_count} multiprocessors"
        )


def _library() -> Iterator[str]:
    built = ops.build_info()
    yield ""
    if not built.compiled:
        yield f"compiled library: none; {built.reason}"
        return
    yield f"compiled library, {HARDWARE}"
    yield f"  CUDA     {built.cuda}"
    yield f"  for      {' '.join(built.architectures)}"
    yield f"  by       {built.compiler}"


def _backends() -> Iterator[str]:
    """The backends on each device; ops with the same backends and reasons share lines."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in [f"cuda:{index}" for index in range(count)] or ["cuda"]:
        ops_of: dict[tuple[tuple[str, str | None], ...], list[str]] = {}
        for op, reasons in backends(device).items():
            ops_of.setdefault(tuple(reasons.items()), []).append(op)
        yield ""
        yield f"backends on {device}, the first choice first"
        for reasons_of_ops, names in ops_of.items():
            yield f"  {', '.join(names)}"
            for backend, reason in reasons_of_ops:
                yield f"    {backend:11}{'runs' if reason is None else reason}"
    yield "on other devices plain torch runs"


def _kernels() -> Iterator[str]:
    """What kernels take of the current device: occupancy is the share of a processor's threads in flight at a time."""
    if not (torch.cuda.is_available() and ops.build_info().compiled):
        return
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    kernels = library.require("python -m resode_cuda").kernel_attributes()
    width = max(len(kernel["name"]) for kernel in kernels)
    yield ""
    yield f"kernels on {device.name}, {HARDWARE}; registers and bytes of local memory of a thread, shared of a block"
    yield f"  {'kernel':{width}} registers  local  shared  occupancy"
    for kernel in kernels:
        occupancy = kernel["blocks_per_processor"] * kernel["threads"] / device.max_threads_per_multi_processor
        shared = kernel["static_shared"] + kernel["dynamic_shared"]
        yield f"  {kernel['name']:{width}} {kernel['registers']:9} {kernel['local']:6} {shared:7} {occupancy:10.0%}"


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has gone, as in `| head -1`, is no error
    main()
