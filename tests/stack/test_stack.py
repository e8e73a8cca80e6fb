"""`ResidualStack` as a module: construction, errors, state_dict, copies, evaluations, dtypes."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, parameters_of, plain, relative_error


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ResidualStack([]), ValueError, r"scheme='euler' needs at least 1 block, got 0; pass a list"),
        (
            lambda: ResidualStack([mlp()], "heun"),
            ValueError,
            "ResidualStack: scheme='heun' needs at least 2 blocks, got 1; use scheme=\"euler\" or add a block",
        ),
        (lambda: ResidualStack([mlp(), torch.tanh]), TypeError, "block 1 must be an nn.Module, got builtin_function"),
        (lambda: ResidualStack([mlp()], "midpoint"), ValueError, r"scheme must be one of \('euler', 'heun'\), got 'mi"),
        (lambda: ResidualStack([mlp()], None), ValueError, "scheme must be one of"),
        (lambda: ResidualStack([mlp()], gradient="magic"), ValueError, "gradient must be one of .*got 'magic'"),
        (
            lambda: ResidualStack([mlp()], reverse="magic"),
            ValueError,
            "reverse must be one of .*or a Reverse, got 'mag",
        ),
        (lambda: ResidualStack([mlp()], reverse=3), ValueError, "reverse must be one of .*got 3"),
        (lambda: ResidualStack([mlp()], step=0), ValueError, "step must be positive and finite, got 0.0; leave it out"),
        (lambda: ResidualStack([mlp()], step=-1.0), ValueError, "step must be positive and finite, got -1.0"),
        (lambda: ResidualStack([mlp()], step=math.nan), ValueError, "step must be positive and finite, got nan"),
        (lambda: ResidualStack([mlp()], step=math.inf), ValueError, "step must be positive and finite, got inf"),
        (lambda: ResidualStack([mlp(), mlp()], step=[1, 0]), ValueError, "step must be positive and finite, got 0.0"),
        (lambda: ResidualStack([mlp(), mlp()], step=[1]), ValueError, "one number or 2, one for each step, got 1"),
        (lambda: ResidualStack([mlp(), mlp()], "heun", step=[1, 1]), ValueError, "one number or 1, one for each step"),
        (lambda: ResidualStack([mlp()], step="fast"), TypeError, "step must be a number, one for each step, or None"),
        (
            lambda: ResidualStack([mlp()], step=nn.Parameter(torch.ones(()))),
            TypeError,
            "step must not require gradients",
        ),
        (lambda: ResidualStack([mlp()], stream_dtype=torch.float8_e5m2), TypeError, "stream_dtype must be one of"),
        (lambda: ResidualStack([mlp()], anchors=0), ValueError, "anchors must be >= 1, got 0; use None for no anchors"),
        (
            lambda: ResidualStack([mlp()], anchors=2.0),
            TypeError,
            "anchors must be an integer, a collection of step numbers or None, got 2.0",
        ),
        (
            lambda: ResidualStack([mlp()], anchors="0"),
            TypeError,
            "anchors must be an integer, a collection of step numbers",
        ),
        (
            lambda: ResidualStack([mlp()], anchors=[True]),
            TypeError,
            "anchors must be step numbers, got True; use integers",
        ),
        (lambda: ResidualStack([mlp()], anchors={1}), ValueError, "numbers of the 1 steps, got 1; count them from 0"),
        (lambda: ResidualStack([mlp()], anchors=[-1]), ValueError, "numbers of the 1 steps, got -1; count them from 0"),
        (lambda: ResidualStack([mlp()], stream_dtype=torch.int32), TypeError, "stream_dtype must be one of .*or None"),
        (lambda: ResidualStack([mlp()], stream_dtype="float32"), TypeError, "stream_dtype must be one of .*or None"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 6, dtype=torch.int64), "x must have a real floating dtype, got torch.int64; convert it, or"),
        (torch.ones(2, 6, dtype=torch.complex64), "x must have a real floating dtype, got torch.complex64"),
        ([1.0], "x must be a tensor, got list"),
    ],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(TypeError, match=message):
        ResidualStack([mlp()])(x)
    with pytest.raises(TypeError, match=message):
        ResidualStack([mlp()]).invert(x)


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.what(x * self.weight)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (lambda x: x[:, :2], ValueError, r"block 1 must keep the shape of its input, got \[4, 6\] -> \[4, 2\]; move b"),
        (lambda x: x[:1], ValueError, r"block 1 must keep the shape of its input, got \[4, 6\] -> \[1, 6\]"),
        (lambda x: x.sum(), ValueError, r"block 1 must keep the shape of its input, got \[4, 6\] -> \[\]"),
        (lambda x: x.double(), TypeError, "must keep the dtype of its input, got torch.float32 -> torch.float64; cast"),
        (lambda x: x.bfloat16(), TypeError, "must keep the dtype of its input, got torch.float32 -> torch.bfloat16"),
        (lambda x: x.to(torch.complex64), TypeError, "must keep the dtype of its input"),
        (lambda x: x.to("meta"), ValueError, "must keep the device of its input, got cpu -> meta; move the stack to"),
        (lambda x: (x, x), TypeError, "block 1 must return one tensor, got tuple; wrap it"),
        (lambda x: None, TypeError, "block 1 must return one tensor, got NoneType"),
    ],
)
def test_blocks_that_break_the_contract_are_named(gradient, what, error, message):
    stack = ResidualStack([mlp(), Gives(what), mlp()], gradient=gradient)
    with pytest.raises(error, match=message):
        stack(torch.randn(4, 6))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_is_that_of_sequential_both_ways(scheme):
    blocks, others = mlps(scheme, 4), mlps(scheme, 4)
    stack, sequential = ResidualStack(blocks, scheme), nn.Sequential(*others)
    assert list(stack.state_dict()) == list(sequential.state_dict())
    assert [name for name, _ in stack.named_parameters()] == [name for name, _ in sequential.named_parameters()]
    sequential.load_state_dict(stack.state_dict(), strict=True)
    assert torch.equal(others[2][0].weight, blocks[2][0].weight)
    stack.load_state_dict(nn.Sequential(*mlps(scheme, 4)).state_dict(), strict=True)
    assert not torch.equal(others[2][0].weight, blocks[2][0].weight)
    half_square(stack(torch.randn(3, 6))).backward()  # what training adds is not in it
    assert list(stack.state_dict()) == list(sequential.state_dict())


def test_blocks_can_be_counted_indexed_iterated_and_replaced():
    blocks = mlps("euler", 12)
    stack = ResidualStack(blocks)
    assert len(stack) == 12
    assert list(stack) == blocks
    assert stack[10] is blocks[10]
    assert stack[-1] is blocks[11]
    with pytest.raises(IndexError):
        stack[12]
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        stack["0"]
    replacement = mlp()
    setattr(stack, "3", replacement)  # as tools that wrap submodules do
    blocks[3] = replacement
    stack.head = nn.Linear(6, 2)  # a subclass may hold more than its blocks
    x = torch.randn(3, 6)
    assert torch.equal(stack(x), plain(blocks, "euler", x))


def test_representation_names_what_the_stack_does():
    assert "scheme='heun', steps=3, gradient='adjoint', reverse=Reverse(predictor='step'" in repr(
        ResidualStack(mlps("heun", 3), "heun")
    )
    assert "gradient='backprop', anchors=2" in repr(ResidualStack([mlp()], gradient="backprop", anchors=2))


def test_settings_can_change_between_training_steps_and_are_checked():
    stack, x = ResidualStack(mlps("euler", 6)), torch.randn(3, 6)
    exact = gradients(lambda: plain(list(stack), "euler", x), list(stack.parameters()))
    stack.reverse, stack.anchors = "extrapolated", 1
    assert stack.reverse == Reverse("extrapolate")
    assert relative_error(gradients(lambda: stack(x), list(stack.parameters())), exact) < 1e-6
    stack.gradient = "checkpoint"
    assert relative_error(gradients(lambda: stack(x), list(stack.parameters())), exact) < 1e-6
    for name in ("gradient", "reverse", "anchors"):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            setattr(stack, name, "unknown")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_train_like_the_original(duplicate):
    stack, x = ResidualStack(mlps("heun", 4), "heun", reverse="extrapolated", step=0.2), torch.randn(3, 6)
    half_square(stack(x)).backward()
    twin = duplicate(stack)
    assert twin.drift is None
    half_square(twin(x)).backward()
    assert twin.drift.maximum == stack.drift.maximum
    assert relative_error([p.grad for p in twin.parameters()], [p.grad for p in stack.parameters()]) < 1e-6


def test_a_whole_model_can_be_saved():
    stack, file = ResidualStack(mlps("euler", 3)), io.BytesIO()
    half_square(stack(torch.randn(3, 6))).backward()
    torch.save(stack, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)[1][0].weight, stack[1][0].weight)


EVALUATIONS = {"paper": 2, "corrected": 2, "extrapolated": 1}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("reverse", EVALUATIONS)
def test_a_training_step_evaluates_blocks_as_often_as_stated(scheme, reverse, corrections):
    solver = ResidualStack([mlp()], reverse=reverse).reverse
    solver = Reverse(solver.predictor, corrections, solver.reuse)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    steps, blocks = 7, mlps(scheme, 7)
    for block in blocks:
        block.register_forward_hook(count)
    half_square(ResidualStack(blocks, scheme, reverse=solver)(torch.randn(3, 6))).backward()
    calls_per_evaluation = SCHEMES[scheme].blocks_per_step
    assert calls == steps * calls_per_evaluation * (1 + EVALUATIONS[reverse] + corrections)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("options", "per_step"), [({"gradient": "backprop"}, 1), ({"gradient": "checkpoint"}, 2), ({"anchors": 1}, 2)]
)
def test_exact_modes_evaluate_blocks_as_often_as_stated(scheme, options, per_step):
    blocks, calls = mlps(scheme, 7), []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    half_square(ResidualStack(blocks, scheme, **options)(torch.randn(3, 6))).backward()
    assert len(calls) == 7 * SCHEMES[scheme].blocks_per_step * per_step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stream_of_16_bit_blocks_is_kept_in_float32(scheme, dtype):
    """In 16 bits the reverse subtraction loses the increments; the gradient would be as bad as the second figure."""
    blocks = [mlp(16, 32) for _ in range(block_count(scheme, 64))]
    x = torch.randn(8, 16)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    errors = {}
    low = nn.ModuleList(copy.deepcopy(blocks)).to(dtype)
    for stream_dtype in (None, dtype):
        stack = ResidualStack(low, scheme, reverse="corrected", stream_dtype=stream_dtype)
        out = stack(x.to(dtype))
        assert out.dtype == dtype
        errors[stream_dtype] = relative_error(torch.autograd.grad(half_square(out), list(low.parameters())), exact)
    assert errors[None] < 16 * torch.finfo(dtype).eps
    assert errors[dtype] > 2 * errors[None]


def test_a_wider_stream_takes_the_rounding_out_of_the_reconstruction():
    blocks, x = mlps("euler", 200, dim=16, hidden=32), torch.randn(8, 16)
    parameters, errors = parameters_of(blocks), {}
    for dtype in (torch.float32, torch.float64):
        stacks = (
            ResidualStack(blocks, stream_dtype=dtype, gradient="backprop"),
            ResidualStack(blocks, stream_dtype=dtype, reverse=Reverse("step", corrections=3)),
        )
        exact, got = (gradients(lambda stack=stack: stack(x), parameters) for stack in stacks)
        errors[dtype] = relative_error(got, exact)
    assert errors[torch.float64] < 0.5 * errors[torch.float32]


def test_every_gradient_mode_computes_the_same_function_in_16_bits():
    blocks, x = nn.ModuleList(mlps("euler", 8)).bfloat16(), torch.randn(3, 6).bfloat16()
    outs = [ResidualStack(blocks, gradient=gradient)(x) for gradient in ("adjoint", "checkpoint", "backprop")]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
