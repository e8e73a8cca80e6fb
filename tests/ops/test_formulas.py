"""The ops' specification against float64, and what their operands may be."""

import pytest
import torch

from resode_cuda import ops
from tests.support.kernel_cases import DTYPE_PAIRS, pair_id
from tests.support.op_cases import MUTATING, VARIANTS, formula, mapped, operands, random, run

SHAPES = [(), (0,), (1,), (3, 0, 5), (7,), (5, 51)]
GPU_BACKENDS = [pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture(params=[("cpu", "torch"), *GPU_BACKENDS], ids=lambda pair: pair[1])
def device(request):
    device, name = request.param
    with ops.using(name):
        yield device


@pytest.mark.parametrize(("name", "stages", "products"), VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_matches_the_formula_in_float64(device, name, stages, products, dtypes):
    for shape in SHAPES:
        values = operands(name, shape, dtypes, device, stages, products)
        exact = formula(name, mapped(torch.Tensor.double, values))
        with ops.using("torch"):
            own = run(name, mapped(torch.clone, values))
        got = run(name, values)
        for result, reference_result, truth in zip(got, own, exact, strict=True):
            if truth is None or truth.numel() == 0:
                continue
            band = torch.finfo(result.dtype).eps * truth.abs().max()
            assert (result - truth).abs().max() <= 2 * ((reference_result - truth).abs().max() + band)
            # The reference is the specification, and has to be near the truth itself.
            assert (result - truth).abs().max() <= 12 * torch.finfo(dtypes[0]).eps * max(1, truth.abs().max())


def test_product_and_sum_of_a_step_are_rounded_once(device):
    x, f = random((10007,), torch.float32, 1, device), random((10007,), torch.float32, 2, device)
    h = torch.tensor(0.1).item()  # as float32 has it
    assert torch.equal(torch.ops.resode.forward_step(x, f, 0.1), (x.double() + h * f.double()).float())


@pytest.mark.parametrize("name", MUTATING)
@pytest.mark.parametrize("view", [lambda t: t, torch.t], ids=["itself", "its transpose"])
def test_what_is_read_may_share_memory_with_what_is_written(name, view):
    """As the products and outputs of blocks do that hand their input on."""
    values = operands(name, (4, 4), (torch.float64, torch.float64))
    values = values._replace(v1=view(values.g))
    if name == "reverse_extrapolate_":
        values = values._replace(k1=view(values.y))
    expected = formula(name, mapped(torch.clone, values))
    for result, truth in zip(run(name, values), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)


def test_stages_of_two_dtypes_are_added_in_the_wider_one():
    x, k1, k2 = random((4, 4), torch.float32, 1), random((4, 4), torch.bfloat16, 2), random((4, 4), torch.float32, 3)
    for a, b in ((k1, k2), (k2, k1)):
        torch.testing.assert_close(torch.ops.resode.heun_step(x, a, b, 0.1), x + 0.05 * (a.float() + b.float()))


def test_autocast_does_not_cast_the_stream():
    x, f = random((4, 3), torch.float32, 1), random((4, 3), torch.bfloat16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.resode.forward_step(x, f, 0.1)
    assert torch.equal(out, x.add(f, alpha=0.1))
    assert out.dtype == torch.float32
