"""What the tests on the PTX machine start from."""

import pytest


@pytest.fixture(autouse=True)
def _cache_without_machine_code(monkeypatch, tmp_path_factory):
    """A folder of kernels without machine code, which no other test may find."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ptx"))
