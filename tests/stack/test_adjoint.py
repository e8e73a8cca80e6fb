"""The adjoint as autograd sees it: every way to ask for gradients that works on the ordinary network works here."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack, Reverse
from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

EXACT = Reverse("step", corrections=30)
"""Converged: what it rebuilds is exact to rounding, so gradients can be compared tightly."""
TIGHT = 1e-12


def exact_stack(blocks, scheme, **options):
    return ResidualStack(blocks, scheme, reverse=options.pop("reverse", EXACT), **options)


def assert_same_gradients(blocks, scheme, x, *args, inputs=None, tolerance=TIGHT, **kwargs):
    if inputs is None:
        inputs = parameters_of(blocks) + [x] * x.requires_grad
    exact = gradients(lambda: plain(blocks, scheme, x, *args, **kwargs), inputs)
    for stack in (
        exact_stack(blocks, scheme),
        ResidualStack(blocks, scheme, anchors=1),
        ResidualStack(blocks, scheme, gradient="checkpoint"),
    ):
        assert relative_error(gradients(lambda stack=stack: stack(x, *args, **kwargs), inputs), exact) < tolerance


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
def test_exact_modes_equal_the_plain_loop_to_the_last_bit(scheme, gradient):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    stack = ResidualStack(blocks, scheme, gradient=gradient)
    assert torch.equal(stack(x), plain(blocks, scheme, x))
    got = gradients(lambda: stack(x), inputs)
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    assert all(map(torch.equal, got, exact))


@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_forward_pass_equals_the_plain_loop_to_the_last_bit(scheme, reverse):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6)
    assert torch.equal(ResidualStack(blocks, scheme, reverse=reverse)(x), plain(blocks, scheme, x))


def test_each_parameters_gradient_is_right_in_a_deep_net(scheme):
    """With Heun an interior block serves two steps; a gradient that lacks one of them is about half."""
    blocks, x = mlps(scheme, 512), torch.randn(5, 6)
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    got = gradients(lambda: ResidualStack(blocks, scheme, reverse=Reverse("step", corrections=2))(x), parameters)
    assert max(relative_error([a], [b]) for a, b in zip(got, exact, strict=True)) < 1e-6


def test_input_and_parameters_get_gradients(scheme):
    assert_same_gradients(mlps(scheme, 10), scheme, torch.randn(5, 6, requires_grad=True))


def test_input_may_need_no_gradient(scheme):
    assert_same_gradients(mlps(scheme, 10), scheme, torch.randn(5, 6))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6), (1, 6)])
def test_any_shape_of_state(scheme, shape):
    blocks, x = mlps(scheme, 4), torch.randn(shape, requires_grad=True)
    if x.numel():
        assert_same_gradients(blocks, scheme, x)
    else:
        assert gradients(lambda: exact_stack(blocks, scheme)(x), [x])[0].shape == shape


def test_states_that_are_not_contiguous(scheme):
    block = [nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1)) for _ in range(6)]
    x = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert_same_gradients(block, scheme, x)
    assert_same_gradients(mlps(scheme, 4), scheme, torch.randn(6, 5).t().requires_grad_())


@pytest.mark.parametrize("frozen", [slice(0, 3), slice(3, 6), slice(0, None), slice(-1, None)])
@pytest.mark.parametrize("input_needs_gradient", [True, False])
@pytest.mark.parametrize("reverse", [EXACT, Reverse("extrapolate", corrections=30)])
def test_frozen_blocks(scheme, frozen, input_needs_gradient, reverse):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6, requires_grad=input_needs_gradient)
    nn.ModuleList(blocks[frozen]).requires_grad_(False)
    inputs = parameters_of(blocks) + [x] * input_needs_gradient
    stack = exact_stack(blocks, scheme, reverse=reverse)
    if inputs:
        exact = gradients(lambda: plain(blocks, scheme, x), inputs)
        assert relative_error(gradients(lambda: stack(x), inputs), exact) < TIGHT
    else:
        assert not stack(x).requires_grad


def test_blocks_without_parameters(scheme):
    blocks = [nn.Sequential(nn.Tanh()) for _ in range(8)]
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


def test_blocks_that_ignore_their_input_or_a_parameter(scheme):
    blocks = [mlp() for _ in range(6)]
    blocks[2] = Constant()
    blocks[3].register_parameter("unused", nn.Parameter(torch.ones(3)))
    x = torch.randn(5, 6, requires_grad=True)
    used = [p for name, p in nn.ModuleList(blocks).named_parameters() if "unused" not in name]
    assert_same_gradients(blocks, scheme, x, inputs=[x, *used])
    exact_stack(blocks, scheme)(x).sum().backward()
    assert blocks[3].unused.grad is None


def test_one_block_used_at_every_step(scheme):
    block = mlp()
    assert_same_gradients([block] * 8, scheme, torch.randn(5, 6, requires_grad=True), tolerance=1e-11)


def test_parameters_shared_between_blocks_and_with_modules_outside(scheme):
    blocks, head = mlps(scheme, 6), nn.Linear(6, 10)
    head.weight = blocks[1][0].weight
    blocks[4][0].weight = blocks[1][0].weight
    inputs = [*parameters_of(blocks), head.bias]
    x = torch.randn(5, 6)
    exact = gradients(lambda: head(plain(blocks, scheme, x)), inputs)
    assert relative_error(gradients(lambda: head(exact_stack(blocks, scheme)(x)), inputs), exact) < TIGHT


def test_parametrized_blocks(scheme):
    blocks = mlps(scheme, 6)
    for block in blocks:
        parametrizations.weight_norm(block[0])
        parametrizations.orthogonal(block[2])
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_by_hooks(scheme):
    blocks = mlps(scheme, 6)
    for block in blocks:
        nn.utils.weight_norm(block[0])
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


def test_nested_stacks(scheme):
    inner = [ResidualStack(mlps("euler", 3), step=0.3, reverse=EXACT) for _ in range(block_count(scheme, 5))]
    x = torch.randn(5, 6, requires_grad=True)
    assert_same_gradients(inner, scheme, x, tolerance=1e-11)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = mlp(), use_reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def test_checkpointing_inside_blocks(scheme):
    blocks = [Checkpointed(use_reentrant=False) for _ in range(6)]
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_inside_blocks_is_refused(scheme):
    stack = exact_stack([Checkpointed(use_reentrant=True) for _ in range(block_count(scheme, 6))], scheme)
    with pytest.raises(RuntimeError, match=r"ResidualStack: the blocks of step 5 .*pass use_reentrant=False"):
        stack(torch.randn(5, 6, requires_grad=True)).sum().backward()


def test_checkpointing_around_the_stack(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    stack = exact_stack(blocks, scheme)
    assert relative_error(gradients(lambda: checkpoint(stack, x, use_reentrant=False), inputs), exact) < TIGHT


def test_saved_tensor_hooks_around_the_stack(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    with torch.autograd.graph.save_on_cpu():
        out = exact_stack(blocks, scheme)(x)
    assert relative_error(torch.autograd.grad(half_square(out), inputs), exact) < TIGHT


@pytest.mark.parametrize("options", [{"reverse": EXACT}, {"anchors": 1}, {"gradient": "checkpoint"}])
def test_functional_call_differentiates_for_the_tensors_it_was_given(scheme, options):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, **options)
    given = {name: (2 * p).detach().requires_grad_() for name, p in stack.named_parameters()}
    made = {name: p * 1.0 for name, p in given.items()}  # no leaves, as an inner loop of meta-learning has them
    got = torch.autograd.grad(half_square(torch.func.functional_call(stack, made, (x,))), list(given.values()))
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.copy_(given[name])
    exact = gradients(lambda: plain(blocks, scheme, x), list(stack.parameters()))
    assert relative_error(got, exact) < TIGHT


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["hook", "saved", "functional"])
def test_a_weight_in_two_places_is_replaced_in_both(scheme, how):
    blocks, x = [Tied() for _ in range(block_count(scheme, 5))], torch.randn(5, 6)
    blocks[2].second.bias = blocks[1].first.bias  # and over the two blocks of a Heun step
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    if how == "hook":
        for parameter in parameters:
            parameter.register_hook(lambda g: None)
        got = gradients(lambda: stack(x), parameters)
    elif how == "saved":
        with torch.autograd.graph.save_on_cpu():
            out = stack(x)
        got = torch.autograd.grad(half_square(out), parameters)
    else:
        given = {name: p.detach().clone().requires_grad_() for name, p in stack.named_parameters()}
        got = torch.autograd.grad(half_square(torch.func.functional_call(stack, given, (x,))), list(given.values()))
    assert relative_error(got, exact) < TIGHT


def test_lazy_blocks_must_have_run_once(scheme):
    blocks = [nn.Sequential(nn.LazyLinear(6), nn.Tanh()) for _ in range(block_count(scheme, 3))]
    stack, x = exact_stack(blocks, scheme), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="parameters of block 0 must be initialised, got a lazy 'weight'; run the"):
        stack(x)
    with torch.no_grad():
        stack(x)
    assert_same_gradients(blocks, scheme, x)


def test_hooks_on_parameters_fire_once_with_the_whole_gradient(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6)
    parameter = blocks[1][0].weight
    exact = gradients(lambda: plain(blocks, scheme, x), [parameter])
    seen = []
    parameter.register_hook(lambda g: seen.append(g) or 2 * g)
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad / 2))
    half_square(exact_stack(blocks, scheme)(x)).backward()
    assert len(seen) == 2
    assert relative_error([*seen, parameter.grad / 2], [*exact] * 3) < TIGHT


def test_backward_accumulates_into_grad_over_micro_batches(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(8, 6)
    stack = exact_stack(blocks, scheme)
    for part in x.split(2):
        half_square(stack(part)).backward()
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    assert relative_error([p.grad for p in stack.parameters()], exact) < TIGHT


@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_backward_twice_over_a_retained_graph(scheme, reverse):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    loss = half_square(ResidualStack(blocks, scheme, reverse=reverse, anchors=4)(x))
    inputs = [x, *parameters_of(blocks)]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retaining_raises_torchs_error(scheme):
    loss = half_square(exact_stack(mlps(scheme, 3), scheme)(torch.randn(5, 6)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_of_some_parameters_only(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    for inputs in ([x], [blocks[0][0].bias], [blocks[-1][2].weight], [blocks[2][0].weight, blocks[4][2].bias]):
        assert_same_gradients(blocks, scheme, x, inputs=inputs)


@pytest.mark.parametrize("reverse", [EXACT, Reverse("extrapolate", corrections=30)])
def test_two_forwards_before_two_backwards(scheme, reverse):
    blocks, x, z = mlps(scheme, 6), torch.randn(5, 6), torch.randn(3, 6)
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme, reverse=reverse)
    first, second = half_square(stack(x)), half_square(stack(z))
    for loss, data in ((first, x), (second, z)):
        exact = gradients(lambda data=data: plain(blocks, scheme, data), parameters)
        assert relative_error(torch.autograd.grad(loss, parameters), exact) < TIGHT


def test_one_stack_in_two_threads(scheme):
    blocks = mlps(scheme, 12)
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme)
    inputs = [torch.randn(7, 6) for _ in range(2)]
    exact = [gradients(lambda x=x: plain(blocks, scheme, x), parameters) for x in inputs]
    errors = []

    def train(which):
        torch.set_default_dtype(torch.float64)
        for _ in range(10):
            errors.append(relative_error(gradients(lambda: stack(inputs[which]), parameters), exact[which]))

    threads = [threading.Thread(target=train, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) < TIGHT


class Conditioned(nn.Module):
    """A block with a scale, a shift inside a dict, a mask and a flag beside the state."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, scale, *, more, mask=None, negate=False):
        out = self.body(x) * scale + more["shift"][0]
        out = out if mask is None else out.masked_fill(mask, 0.0)
        return -out if negate else out


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_arguments_reach_every_block_and_their_tensors_get_gradients(scheme, gradient):
    blocks = [Conditioned() for _ in range(block_count(scheme, 6))]
    x, scale, shift = torch.randn(5, 6), torch.randn(6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    mask = torch.rand(5, 6) > 0.7
    stack = exact_stack(blocks, scheme, gradient=gradient)
    inputs = [scale, shift, *parameters_of(blocks)]
    # The conditioning tensors come out of a graph of their own, as from an encoder.
    call = lambda run: run(x, scale * 2, more={"shift": (shift.sin(),)}, mask=mask, negate=True)  # noqa: E731
    exact = gradients(lambda: call(lambda *a, **k: plain(blocks, scheme, *a, **k)), inputs)
    assert relative_error(gradients(lambda: call(stack), inputs), exact) < TIGHT


def test_a_tensor_the_blocks_got_behind_the_stacks_back_is_an_error_every_time(scheme):
    secret = torch.randn(6, requires_grad=True)

    class Leaky(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * secret

    stack, x = exact_stack([mlp(), Leaky(), mlp()], scheme), torch.randn(5, 6)
    stack(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a tensor of shape \[6\] that needs gradients and is neither"):
            half_square(stack(x)).backward()


def test_an_argument_may_be_called_x(scheme):
    class Shifted(nn.Module):
        def forward(self, state, x):
            return torch.tanh(state) + x

    blocks, x, shift = [Shifted() for _ in range(block_count(scheme, 3))], torch.randn(5, 6), torch.randn(6)
    stack = exact_stack(blocks, scheme)
    assert torch.equal(stack(x, x=shift), plain([lambda s: torch.tanh(s) + shift] * len(blocks), scheme, x))
    assert relative_error([stack.invert(stack(x, x=shift), x=shift)], [x]) < TIGHT


def test_no_graph_without_gradients(scheme):
    stack, x = exact_stack(mlps(scheme, 4), scheme), torch.randn(5, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(stack(x), plain(list(stack), scheme, x))
            assert not stack(x).requires_grad
    assert stack.drift is None


DOUBLE = 'first derivatives in reverse mode only, got {}; use gradient="backprop"'


def test_double_backward_is_refused(scheme):
    stack, x = exact_stack(mlps(scheme, 4), scheme), torch.randn(5, 6, requires_grad=True)
    message = "got a double backward"
    with pytest.raises(RuntimeError, match=message):  # a gradient penalty
        torch.autograd.grad(half_square(stack(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        half_square(stack(x)).backward(create_graph=True)
    stack.gradient = "backprop"
    (g,) = torch.autograd.grad(half_square(stack(x)), x, create_graph=True)
    half_square(g).backward()
    assert x.grad is not None


# torch's forward mode scripts some decompositions on first use.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@scripts
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: half_square(f(x)))(x),
        lambda f, x: torch.func.vjp(f, x)[1](x)[0],
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.hessian(lambda x: half_square(f(x)))(x),
    ],
    ids=["grad", "vjp", "jacrev", "vmap", "hessian"],
)
def test_function_transforms_are_refused(scheme, transform):
    stack, x = exact_stack(mlps(scheme, 3), scheme), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match=r'got a torch\.func transform; use gradient="backprop"'):
        transform(stack, x)
    stack.gradient = "backprop"
    exact = transform(lambda x: plain(list(stack), scheme, x), x)
    assert relative_error([transform(stack, x).detach()], [exact.detach()]) < TIGHT


@scripts
def test_forward_mode_is_refused(scheme):
    stack, x, tangent = exact_stack(mlps(scheme, 3), scheme), torch.randn(2, 6), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match='use gradient="backprop"'):
        torch.func.jvp(stack, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="got forward-mode"):
        stack(torch.autograd.forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.parametrize("with_transform", [False, True], ids=["dual tensors", "torch.func"])
def test_forward_mode_where_reverse_mode_is_off(scheme, gradient, with_transform):
    stack, x, tangent = exact_stack(mlps(scheme, 3), scheme, gradient=gradient), torch.randn(2, 6), torch.randn(2, 6)
    with torch.no_grad():
        if with_transform:
            got = torch.func.jvp(stack, (x,), (tangent,))[1]
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, tangent)
                got = torch.autograd.forward_ad.unpack_dual(stack(dual)).tangent
    exact = torch.func.jvp(lambda x: plain(list(stack), scheme, x), (x,), (tangent,))[1]
    assert relative_error([got], [exact.detach()]) < TIGHT


def test_batched_gradients(scheme):
    blocks, x = mlps(scheme, 3), torch.randn(2, 6, requires_grad=True)
    seeds = torch.randn(4, 2, 6)
    exact = torch.autograd.grad(plain(blocks, scheme, x), x, seeds, is_grads_batched=True)
    got = torch.autograd.grad(exact_stack(blocks, scheme)(x), x, seeds, is_grads_batched=True)
    assert relative_error(got, exact) < TIGHT


class Echo(torch.autograd.Function):
    """scale x, whose backward hands out tensors that it was given: x as the gradient of scale."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        return scale * x

    @staticmethod
    def backward(ctx, g):
        return g, ctx.saved_tensors[0].detach()


class Echoing(nn.Module):
    """Adds what it is given, so that the cotangent of its output is that of an argument and of a parameter, too."""

    def __init__(self):
        super().__init__()
        self.body, self.shift, self.scale = mlp(), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x, shift, transposed):
        return self.body(x) + Echo.apply(x, self.scale) + self.shift + shift + transposed.T


@pytest.mark.parametrize("anchors", [1, None])
@pytest.mark.parametrize("preset", ["paper", "corrected", "extrapolated"])
def test_gradients_that_share_memory_with_the_cotangent_are_not_overwritten(scheme, preset, anchors):
    blocks = [Echoing() for _ in range(block_count(scheme, 4))]
    x, shift, transposed = (torch.randn(shape, requires_grad=True) for shape in [(5, 6), (5, 6), (6, 5)])
    wanted, steps = [x, shift, transposed, *parameters_of(blocks)], [0.1, 0.07, 0.13, 0.03]
    reverse = replace(PRESETS[preset], corrections=60)
    stack = ResidualStack(blocks, scheme, step=steps, reverse=reverse, anchors=anchors)
    exact = gradients(lambda: plain(blocks, scheme, x, shift, transposed, h=steps), wanted)
    assert relative_error(gradients(lambda: stack(x, shift, transposed), wanted), exact) < TIGHT


@pytest.mark.parametrize(
    ("gradient", "victim"),
    [
        *(("adjoint", victim) for victim in ("output", "parameter", "argument", "anchor")),
        *(("checkpoint", victim) for victim in ("parameter", "argument")),
    ],
)
def test_what_backward_needs_must_not_change_in_place(scheme, gradient, victim):
    blocks = [Conditioned() for _ in range(block_count(scheme, 4))]
    stack = exact_stack(blocks, scheme, gradient=gradient, anchors=2)
    x, scale, shift = torch.randn(5, 6), torch.randn(6), torch.randn(5, 6)
    out = stack(x, scale, more={"shift": [shift]})
    changed = {"output": out, "parameter": blocks[2].body[0].weight, "argument": scale, "anchor": x}[victim]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="ResidualStack: between forward and backward neither the stack's output"):
        half_square(out).backward()


def test_output_changed_in_place_by_a_recorded_operation(scheme):
    stack = exact_stack(mlps(scheme, 3), scheme)
    out = stack(torch.randn(5, 6))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="use y = y \\+ z instead of y \\+= z"):
        half_square(out).backward()


class Rude(nn.Module):
    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_blocks_that_change_their_input_are_refused(scheme, gradient):
    stack = ResidualStack([mlp(), Rude(), mlp()], scheme, gradient=gradient)
    with pytest.raises(RuntimeError, match="block 1 must not modify its input in place"):
        stack(torch.randn(5, 6, requires_grad=True))


# Dynamo looks at .grad of tensors that are no leaves and hides the warning, which pytest turns into an error first.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@compiles
def test_a_compiled_model_runs_the_stack_uncompiled_and_right(scheme):
    blocks = [nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(block_count(scheme, 4))]
    head, x = nn.Linear(6, 6), torch.randn(5, 6)
    stack = exact_stack(blocks, scheme)
    parameters = parameters_of(blocks)

    def model(run):
        torch.manual_seed(7)
        return head(run(head(x)))

    exact = gradients(lambda: model(lambda x: plain(blocks, scheme, x)), parameters)
    compiled = torch.compile(lambda: model(stack), backend="aot_eager")
    assert relative_error(gradients(compiled, parameters), exact) < TIGHT


class OwnBlock(nn.Module):
    """Module.compile leaves the classes of torch.nn itself uncompiled."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x)


@compiles
def test_blocks_compiled_on_their_own_stay_compiled(scheme):
    blocks, x = [OwnBlock() for _ in range(block_count(scheme, 3))], torch.randn(5, 6)
    parameters, keys = parameters_of(blocks), list(nn.Sequential(*blocks).state_dict())
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in blocks:
        block.compile(backend=backend)
    stack = exact_stack(blocks, scheme)
    assert relative_error(gradients(lambda: stack(x), parameters), exact) < TIGHT
    assert graphs
    assert list(stack.state_dict()) == keys
