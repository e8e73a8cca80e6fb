"""The quick runs of `python -m bench` that several tests look at."""

import json

import pytest

from tests.support.bench_run import run_bench


def quick_run(output, *arguments):
    """The process of a run on a CPU, the folder that it wrote to, and its results."""
    done = run_bench("--quick", "--device", "cpu", "--threads", "1", "--output", str(output), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, output, json.loads((output / "results.json").read_text())


@pytest.fixture(scope="session")
def quick_default(tmp_path_factory):
    """A run of the sections that run by default."""
    return quick_run(tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="session")
def quick_others(tmp_path_factory):
    """A run of those that run where they are named."""
    return quick_run(tmp_path_factory.mktemp("others"), "--only", "kernels", "mlp", "backends", "stored", "overhead")
