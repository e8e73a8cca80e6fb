"""Builds resode_cuda._kernels with CMake where a CUDA compiler is found; a plain Python package otherwise.

CUDACXX             the CUDA compiler; else CUDA_HOME or CUDA_PATH (bin/nvcc), else nvcc on PATH
RESODE_CUDA_ARCHS   architectures to compile for, e.g. "90;100"; default: 80, 90, 100, 120 where the compiler knows them
RESODE_SKIP_CUDA=1  no CUDA, even where there is a compiler

Everything else about the build is in CMakeLists.txt, everything else about the package in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")
LICENSE = "Apache-2.0"
OLDEST_WITH_EXPRESSIONS = 77
"""Major version of the first setuptools that takes a license as an SPDX expression; older ones take any text."""
WAY_OUT = "choose architectures with RESODE_CUDA_ARCHS=..., or install without CUDA with RESODE_SKIP_CUDA=1"


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The CUDA compiler to use, or None: none is found, or it is not wanted."""
    if environ.get("RESODE_SKIP_CUDA", "0") not in ("", "0"):
        return None
    if chosen := environ.get("CUDACXX"):
        if found := shutil.which(chosen, path=environ.get("PATH")):
            return found
        raise SetupError(f"resode_cuda: CUDACXX must name a CUDA compiler, got {chosen!r}, not found; {WAY_OUT}")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        # A toolkit of libraries alone has no nvcc: go on looking.
        if (root := environ.get(variable)) and (found := shutil.which("nvcc", path=str(Path(root) / "bin"))):
            return found
    return shutil.which("nvcc", path=environ.get("PATH"))


def choose_architectures(wanted: str | None, supported: Sequence[str]) -> list[str]:
    """CMake's CUDA_ARCHITECTURES: machine code for each, and PTX of the newest, which later GPUs can run.

    Args:
        wanted: RESODE_CUDA_ARCHS, e.g. "90;100a"; None or empty for the defaults.
        supported: numbers that the compiler knows, e.g. ["80", "90"].
    """
    if wanted:
        chosen = [entry for entry in re.split(r"[;,\s]+", wanted) if entry]
        unknown = [entry for entry in chosen if entry.rstrip("af") not in supported]
    else:
        chosen = [entry for entry in DEFAULT_ARCHITECTURES if entry in supported]
        unknown = [] if chosen else list(DEFAULT_ARCHITECTURES)
    if unknown:
        raise SetupError(
            f"resode_cuda: the CUDA compiler must know the architectures, got {' '.join(unknown)}; "
            f"it knows {' '.join(supported)}; {WAY_OUT}"
        )
    # PTX of 90a or 100f runs on no later GPU.
    newest = max((entry for entry in chosen if entry.isdecimal()), key=int, default=None)
    return [entry if entry == newest else f"{entry}-real" for entry in chosen]


def supported_architectures(nvcc: str) -> list[str]:
    listed = run(nvcc, "--list-gpu-arch", capture=True)
    return sorted(set(re.findall(r"compute_(\d+)\b", listed)), key=int)


def run(*command: str, capture: bool = False) -> str:
    """Run a build command; its output goes to the terminal unless captured.

    Raises:
        CompileError: if it fails or is not there.
    """
    # Last on PATH, the tools installed beside this Python, whose environment need not be activated.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    out = subprocess.PIPE if capture else None
    try:
        done = subprocess.run(command, check=True, text=True, stdout=out, env={**os.environ, "PATH": path})
    except (OSError, subprocess.CalledProcessError) as error:
        cause = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise CompileError(
            f"resode_cuda: the CUDA build must succeed, got {cause} from `{shlex.join(command)}`, "
            f"whose output is above; {WAY_OUT}"
        ) from error
    return done.stdout or ""


class Kernels(Extension):
    def __init__(self, nvcc: str) -> None:
        super().__init__("resode_cuda._kernels", sources=[])
        self.nvcc = nvcc


class CMakeBuild(build_ext):
    """Builds the extension by CMake instead of setuptools' own compiler calls."""

    def build_extension(self, ext: Kernels) -> None:
        architectures = choose_architectures(os.environ.get("RESODE_CUDA_ARCHS"), supported_architectures(ext.nvcc))
        print(f"resode_cuda: compiling for {' '.join(architectures)} with {ext.nvcc}", flush=True)
        pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir", capture=True).strip()
        source = Path(__file__).parent.resolve()
        build = Path(self.build_temp).resolve() / "kernels"
        # Under build isolation cmake, ninja and pybind11 are somewhere else each time: --fresh forgets where they were.
        run(
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(source), "-B", str(build)),
            f"-DCMAKE_CUDA_COMPILER={ext.nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).parent.resolve()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
        )
        run("cmake", "--build", str(build))


def extensions(environ: Mapping[str, str]) -> list[Extension]:
    """The compiled library if it can be built; else none, which makes the wheel a pure Python one."""
    if nvcc := find_nvcc(environ):
        return [Kernels(nvcc)]
    print("resode_cuda: no nvcc, or RESODE_SKIP_CUDA is set; installing without compiled kernels", flush=True)
    return []


def license_of(setuptools_version: str) -> dict[str, str]:
    """The license as this version of setuptools takes it."""
    takes_expressions = int(setuptools_version.split(".")[0]) >= OLDEST_WITH_EXPRESSIONS
    return {"license_expression" if takes_expressions else "license": LICENSE}


if __name__ == "__main__":
    setup(
        ext_modules=extensions(os.environ),
        cmdclass={"build_ext": CMakeBuild},
        **license_of(setuptools.__version__),
    )
