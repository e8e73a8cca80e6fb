"""Processes that compute together, started once for all tests of this folder, which one worker runs."""

from pathlib import Path

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from tests.support.ranks import Ranks

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Three processes that compute together over gloo."""
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def mesh():
    """This process alone. What it holds can be told to the byte, since no thread of gloo's holds buffers a while."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
