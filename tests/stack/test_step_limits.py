"""Steps that are refused: of which a dtype cannot hold h, 1/h or the ratios that are multiplied by, and of tensors that
ask for gradients."""

import math

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack, functional
from resode_cuda.method import Method
from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, mlps


def stack(dtype, scheme, **options):
    return ResidualStack([block.to(dtype) for block in mlps(scheme, 4)], scheme, **options)


def residual_mlp(dtype, scheme, **options):
    return ResidualMLP(6, 10, 4, scheme, dtype=dtype, **options)


def as_function(dtype, scheme, **options):
    layers = block_count(scheme, 4)
    weights = torch.randn(layers, 10, 6, dtype=dtype), torch.randn(layers, 6, 10, dtype=dtype)
    return lambda x: functional.residual_mlp(x, weights[0], None, weights[1], None, scheme, **options)


MAKERS = {"ResidualStack": stack, "ResidualMLP": residual_mlp, "residual_mlp": as_function}
REFUSED = [
    (torch.float32, 1e-40, "corrected"),
    (torch.float32, 1e-38, "paper"),
    (torch.float32, [0.1, 0.1, 1e-39, 0.1], "corrected"),
    (torch.float32, 1e39, "corrected"),
    (torch.float32, [1e-30, 1e-30, 1e10, 1.0], "corrected"),
    (torch.float32, [1e30, 1.0, 1e-15, 1.0], "extrapolated"),
    (torch.bfloat16, 1e-40, "corrected"),
    (torch.float64, 1e-310, "corrected"),
    (torch.float64, 5e-324, "paper"),
    (torch.float64, [1.0, 1e-200, 1e200, 1.0], "corrected"),
    (torch.float64, [1e-200, 1.0, 1e150, 1.0], "extrapolated"),
]


@pytest.mark.parametrize(("dtype", "step", "reverse"), REFUSED, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_that_the_states_cannot_hold_are_refused(name, scheme, dtype, step, reverse):
    x = torch.randn(3, 6, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^{name}: step must .* in float(32|64), got .*1/4"):
        MAKERS[name](dtype, scheme, step=step, reverse=reverse)(x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["ResidualStack", "ResidualMLP"])
def test_what_no_dtype_holds_is_refused_at_construction(name, scheme):
    for step, reverse in ((1e-310, "corrected"), ([1e-200, 1.0, 1e150, 1.0], "extrapolated")):
        with pytest.raises(ValueError, match=rf"^{name}: step must keep h, 1/h and the ratios .* in float64, got"):
            MAKERS[name](torch.float32, scheme, step=step, reverse=reverse)


def test_the_message_has_the_limits_and_what_was_met():
    message = (
        r"^ResidualStack: step must keep h, 1/h and the ratios of successive steps between 1\.2e-38 and 3\.4e\+38 in "
        r"float32, got factors from 1\.0e-40 to 1\.0e\+40; use steps closer to 1/4, or a wider dtype$"
    )
    for gradient in ("adjoint", "checkpoint", "backprop"):
        with pytest.raises(ValueError, match=message):
            stack(torch.float32, "euler", step=1e-40, gradient=gradient)(torch.randn(3, 6))
    with pytest.raises(ValueError, match=message):
        stack(torch.float32, "euler", step=1e-40).invert(torch.randn(3, 6))


def test_a_wider_stream_holds_them():
    x, module = torch.randn(3, 6), stack(torch.float32, "euler", step=1e-40, stream_dtype=torch.float64)
    x.requires_grad_()
    (g,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(g, torch.ones_like(x))
    narrow = stack(torch.float16, "euler", step=1e-6, stream_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"in float16, got factors from 1\.0e-06"):
        narrow(x.detach().half())


# A step of 1e3 can't be undone, and states outgrow the first ones.
@pytest.mark.filterwarnings("ignore:ResidualStack. block.* changed its increment")
@pytest.mark.filterwarnings("ignore:ResidualMLP. the increment of step 1 could not be stored in its bits")
@pytest.mark.parametrize("reverse", PRESETS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_within_the_limits_have_finite_gradients(name, scheme, reverse):
    for step in (4e-38, [1e-3, 1e3, 1e-6, 1e-3]):
        x = torch.randn(3, 6, requires_grad=True)
        module = MAKERS[name](torch.float32, scheme, step=step, reverse=reverse, gradient="adjoint")
        out = module(x)
        (g,) = torch.autograd.grad(out, x, 1e-3 * torch.ones_like(out))
        assert g.isfinite().all()


@pytest.mark.parametrize("steps", [(0.0, 0.1, 0.1), (0.1, 0.0, 0.1), (math.nan, 0.1, 0.1), (0.1, math.inf, math.inf)])
def test_a_method_of_impossible_steps_says_so_when_it_is_checked(steps):
    for solver in PRESETS.values():
        with pytest.raises(ValueError, match=r"^here: step must keep"):
            Method(SCHEMES["euler"], steps, solver).check_steps("here", torch.float64)


def learnable(h=0.25):
    return nn.Parameter(torch.tensor(h))


LEARNABLE = {
    "a parameter": learnable,
    "a vector": lambda: nn.Parameter(torch.full((4,), 0.25)),
    "a list": lambda: [0.25, 0.25, learnable(), 0.25],
    "a tuple": lambda: (learnable(),) * 4,
    "a ParameterList": lambda: nn.ParameterList(learnable() for _ in range(4)),
    "computed ones": lambda: [2 * learnable(0.125) for _ in range(4)],
    "a generator": lambda: (learnable() for _ in range(4)),
}


@pytest.mark.parametrize("step", LEARNABLE.values(), ids=LEARNABLE)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_that_require_gradients_are_refused(name, step):
    message = f"^{name}: step must not require gradients, got a tensor that does; detach it"
    with pytest.raises(TypeError, match=message):
        MAKERS[name](torch.float32, "euler", step=step())(torch.randn(3, 6))


@pytest.mark.parametrize("step", [torch.tensor(0.25), torch.full((4,), 0.25), [learnable().detach()] * 4, (0.25,) * 4])
def test_steps_of_tensors_are_numbers(step):
    assert stack(torch.float32, "euler", step=step).steps == (0.25,) * 4
