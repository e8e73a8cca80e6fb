#!/usr/bin/env bash
# Builds the package in place: an editable install, and where that fails the compiled library alone, by CMake. setuptools
# below 77, for one, rejects the license in pyproject.toml. What CMake alone has built is found from the checkout only.
#
#   [RESODE_CUDA_ARCHS=90] bench/build.sh    (architectures as setup.py takes them)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # python3 may be the system's
python3 -m pip install --no-build-isolation --no-deps --verbose --editable . && exit
echo "build.sh: the editable install failed, as above; building the compiled library by CMake"
# Last on PATH, the tools installed beside this Python.
PATH=$PATH:$(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
cmake --fresh -G Ninja -S . -B build/kernels \
  -DCMAKE_CUDA_ARCHITECTURES="${RESODE_CUDA_ARCHS:-80;90;100;120}" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/resode_cuda" \
  -DPython_EXECUTABLE="$(python3 -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" &&
  cmake --build build/kernels
