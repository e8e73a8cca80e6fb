"""What every test starts from: a fixed seed, and a reason where a GPU is missing."""

import os
from pathlib import Path

import pytest
import torch

from tests.support import evidence
from tests.support.host_build import build, load
from tests.support.kernel_families import reason_to_skip
from tests.support.once import once

ROOT = Path(__file__).parents[1]

# The tensors are tiny: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords:
            path = item.path.relative_to(ROOT).as_posix()
            reason = reason_to_skip(path, item.originalname) if torch.cuda.is_available() else "needs a CUDA device"
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config):
    if evidence.RECORD in os.environ:
        noticing = evidence.noticing()
        noticing.__enter__()
        config.add_cleanup(lambda: noticing.__exit__(None, None, None))


def pytest_runtest_logreport(report):
    if evidence.RECORD in os.environ:
        evidence.take(report.when == "call" and report.passed, os.environ[evidence.RECORD])


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def off_the_kink():
    """With this seed no unit of `fused_cases` is so close to relu's kink that rounding to bfloat16 decides its side."""
    torch.manual_seed(1)


@pytest.fixture
def float64():
    """float64 as the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """A folder that all workers of a test run share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def host_build(shared_folder):
    """The folder of the CUDA sources' module for the CPU."""
    return once(shared_folder / "host_build", build)


@pytest.fixture(scope="session")
def kernels(host_build):
    """The compiled library as built for the CPU: its launchers run the CUDA sources on the host."""
    return load(host_build, "_kernels")


@pytest.fixture
def triton_cache(monkeypatch, tmp_path_factory):
    """The folder of kernels that Triton compiles, shared by this run's tests and never by an earlier run's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
