"""setup.py and the source distribution: what is built, for which architectures, and what a failure tells the user."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = ["75", "80", "90", "100", "120"]


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("resode_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def run(*command, **environ):
    """With the environment's own choice of a CUDA compiler taken out."""
    chosen = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "RESODE_CUDA_ARCHS")
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.run(
        command, env=inherited | environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
    )


def test_compiler_is_looked_for_in_order(setup_py, tmp_path):
    cudacxx = program(tmp_path / "chosen" / "my-nvcc", "")
    home = program(tmp_path / "home" / "bin" / "nvcc", "")
    path = program(tmp_path / "path" / "nvcc", "")
    (tmp_path / "libraries_only" / "bin").mkdir(parents=True)
    environ = {"CUDACXX": cudacxx, "CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    assert setup_py.find_nvcc(environ) == cudacxx
    del environ["CUDACXX"]
    assert setup_py.find_nvcc(environ) == home
    environ["CUDA_PATH"] = environ.pop("CUDA_HOME")
    assert setup_py.find_nvcc(environ) == home
    environ["CUDA_PATH"] = str(tmp_path / "libraries_only")
    assert setup_py.find_nvcc(environ) == path


def test_no_extension_without_a_compiler_or_where_it_is_not_wanted(setup_py, tmp_path):
    program(tmp_path / "nvcc", "")
    assert setup_py.extensions({"PATH": str(tmp_path / "empty")}) == []
    assert setup_py.extensions({"PATH": str(tmp_path), "RESODE_SKIP_CUDA": "1"}) == []
    assert len(setup_py.extensions({"PATH": str(tmp_path), "RESODE_SKIP_CUDA": "0"})) == 1


def test_a_compiler_that_was_named_must_be_there(setup_py):
    with pytest.raises(
        setup_py.SetupError, match=r"CUDACXX must name a CUDA compiler, got 'nowhere'.*RESODE_SKIP_CUDA=1"
    ):
        setup_py.find_nvcc({"CUDACXX": "nowhere", "PATH": ""})


@pytest.mark.parametrize(
    ("wanted", "supported", "chosen"),
    [
        (None, KNOWN, ["80-real", "90-real", "100-real", "120"]),
        ("", KNOWN, ["80-real", "90-real", "100-real", "120"]),
        (None, ["75", "80", "86", "90"], ["80-real", "90"]),
        ("90;100", KNOWN, ["90-real", "100"]),
        ("100, 90", KNOWN, ["100", "90-real"]),
        ("90a", KNOWN, ["90a-real"]),
        ("80 90a", KNOWN, ["80", "90a-real"]),
    ],
)
def test_architectures(setup_py, wanted, supported, chosen):
    assert setup_py.choose_architectures(wanted, supported) == chosen


@pytest.mark.parametrize(("wanted", "supported"), [("90;200", KNOWN), ("sm_90", KNOWN), (None, ["60", "70"])])
def test_architectures_that_the_compiler_does_not_know(setup_py, wanted, supported):
    with pytest.raises(setup_py.SetupError, match=rf"must know .*, got .*; it knows {' '.join(supported)}; "):
        setup_py.choose_architectures(wanted, supported)


def test_architectures_are_read_from_the_compiler(setup_py, tmp_path):
    nvcc = program(tmp_path / "nvcc", "printf 'compute_100\\ncompute_90\\ncompute_90a\\n'")
    assert setup_py.supported_architectures(nvcc) == ["90", "100"]


@pytest.mark.parametrize(
    ("setuptools_version", "expected"),
    [
        ("64.0.3", {"license": "Apache-2.0"}),
        ("76.1", {"license": "Apache-2.0"}),
        ("77.0.3", {"license_expression": "Apache-2.0"}),
        ("84.2.1.post0", {"license_expression": "Apache-2.0"}),
    ],
)
def test_license_as_each_setuptools_takes_it(setup_py, setuptools_version, expected):
    assert setup_py.license_of(setuptools_version) == expected


NOT_INSTALLED = """
from importlib import metadata

found = metadata.Distribution.from_name

def without_the_package(name):
    if name.replace("-", "_") == "resode_cuda":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.Distribution.from_name = without_the_package
import resode_cuda

print(resode_cuda.__version__)
"""


def test_the_package_need_not_be_installed():
    """Its sources on the path are enough, and have the version that a build reads."""
    done = run(sys.executable, "-c", NOT_INSTALLED, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "0.1.0"


def test_a_failed_build_fails_the_install_and_says_the_way_out(checkout, tmp_path):
    for requirement in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(requirement)
    nvcc = program(tmp_path / "nvcc", '[ "$1" = --list-gpu-arch ] && echo compute_90')  # compiles nothing
    arguments = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    done = run(sys.executable, str(checkout / "setup.py"), *arguments, CUDACXX=nvcc, RESODE_SKIP_CUDA="0")
    assert done.returncode != 0
    assert "CMake Error" in done.stdout
    message = done.stdout.splitlines()[-1]
    assert message.startswith("error: resode_cuda: the CUDA build must succeed, got exit status 1 from `cmake ")
    assert message.endswith(
        "; choose architectures with RESODE_CUDA_ARCHS=..., or install without CUDA with RESODE_SKIP_CUDA=1"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy to build in, which leaves the real one alone; with a compiled library, as an editable install has."""
    copy = tmp_path_factory.mktemp("checkout")
    for pattern in ("*.toml", "*.txt", "*.in", "*.md", "setup.py", "LICENSE", "Makefile"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    for name in ("bench", "csrc", "resode_cuda", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (copy / "resode_cuda" / "_kernels.so").touch()
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The unpacked source distribution."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(checkout))
    assert done.returncode == 0, done.stdout
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def files(root, *patterns):
    return {str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern) if path.is_file()}


def test_sdist_has_all_that_a_build_needs(sdist, checkout):
    assert sdist.name == "resode_cuda-0.1.0"
    sources = (
        "csrc/**/*",
        "resode_cuda/**/*.py",
        "resode_cuda/py.typed",
        "tests/**/*.py",
        "bench/**/*.py",
        "bench/*.sh",
    )
    needed = files(checkout, *sources, "*.toml", "*.txt", "*.in", "*.md", "setup.py", "LICENSE", "Makefile")
    assert needed <= files(sdist, "**/*")
    assert not files(sdist, "**/*.so", "**/*.pyc")


def test_wheel_from_the_sdist_without_cuda_is_pure_python(sdist, tmp_path):
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(sdist))
    done = run(*command, RESODE_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(tmp_path / "resode_cuda-0.1.0-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read("resode_cuda-0.1.0.dist-info/METADATA").decode()
    package = files(sdist, "resode_cuda/**/*.py", "resode_cuda/py.typed")
    assert {name for name in names if ".dist-info/" not in name} == package
    assert "resode_cuda-0.1.0.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata
