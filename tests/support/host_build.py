"""Builds the CUDA sources for the CPU (CMake's RESODE_HOST)."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


def build(folder):
    scripts = Path(sysconfig.get_path("scripts"))
    cmake = scripts / "cmake" if (scripts / "cmake").exists() else "cmake"
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run(
        *(cmake, "-S", ROOT, "-B", folder, "-DRESODE_HOST=ON", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"),
    )
    run(cmake, "--build", folder, "--parallel", "2")


def load(folder, name):
    """A module of the build, under a name that leaves an installed library alone."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
