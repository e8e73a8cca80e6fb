"""Every test of the depth-fused stack that asks for a scheme runs with each."""

import pytest

from resode_cuda.schemes import SCHEMES


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param
