"""Activations of Triton's kernels in the interpreter: `test_fused_triton.py` runs this file in a process of its own.

TRITON_INTERPRET=1 python -m pytest tests/fused/interpreted_activations.py
"""

import pytest
import torch
import triton

from resode_cuda.fused.triton.arguments import ACTIVATIONS, APPROXIMATED
from tests.support.activation_accuracy import GATED, activated, errors, exact

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"
# Numbers overflow on purpose, and series are computed where they are not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

FORMS = [*((name, False) for name in ACTIVATIONS), *((name, True) for name in GATED)]


@pytest.mark.parametrize(("name", "approximates"), FORMS)
def test_formulas(name, approximates):
    """In the interpreter tanh is plain in either form. Slopes of gelu_tanh have z^3 times what a sigmoid is off."""
    z = torch.linspace(-12, 12, 1024)
    for one, other in zip(activated(name, approximates, z), exact(name, z), strict=True):
        assert ((one - other).abs() <= 5e-7 * (1 + z.abs())).all()


@pytest.mark.parametrize(("name", "approximates"), FORMS)
def test_finite_where_z_is(name, approximates):
    magnitude = torch.tensor([1e3, 1.8e19, 1.9e19, 1e25, 1e30, 3e38, 3.4e38, torch.finfo(torch.float32).max])
    z = torch.cat([magnitude, -magnitude])
    value, slope = activated(name, approximates, z)
    limits = {"tanh": z.sign(), "identity": z}.get(name, z.clamp(min=0))
    assert torch.equal(value, limits)
    limits = {"tanh": 0 * z, "identity": 0 * z + 1}.get(name, (z > 0).float())
    assert torch.equal(slope, limits)


@pytest.mark.parametrize("name", GATED)
def test_the_approximate_form_is_taken_where_it_is_off_by_less_than_bfloat16_rounds(name):
    """Its value relative to z, of which bfloat16 rounds off as much."""
    half_eps = torch.finfo(torch.bfloat16).eps / 2
    value, slope = errors(name, True, 8)
    assert (value <= 8 * half_eps and slope <= half_eps) == (name in APPROXIMATED)
    if name == "tanh":
        assert value <= half_eps
