"""Blocks with state of their own: a re-evaluation runs as the first one ran, and leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, gradients, half_square, mlp, parameters_of, plain, relative_error
from tests.support.stateful import assert_same_buffers, conv_bn, plain_twin, train_step

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]


EXACT = Reverse("step", corrections=20)


MODES = {
    "exact": {"reverse": EXACT},
    "corrected": {"reverse": "corrected"},
    "extrapolated": {"reverse": "extrapolated"},
    "paper": {"reverse": "paper"},
    "anchored": {"anchors": 2},
    "checkpoint": {"gradient": "checkpoint"},
}


every_mode = pytest.mark.parametrize("mode", MODES)


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass as image libraries have it, with the kernel called directly."""

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Renorm(nn.BatchNorm2d):
    """Reads the running statistics that it then updates."""

    def forward(self, x):
        scale = (self.running_var.clone() + 1).rsqrt()
        return super().forward(x) * scale.view(1, -1, 1, 1)


def norms():
    return [
        nn.BatchNorm2d,
        lambda n: nn.BatchNorm2d(n, momentum=None),
        lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
        lambda n: nn.BatchNorm2d(n, track_running_stats=False),
        OwnBatchNorm,
        Renorm,
    ]


@every_mode
@pytest.mark.parametrize(
    "norm", norms(), ids=["batch", "batch-cumulative", "instance", "batch-untracked", "own", "renorm"]
)
def test_running_statistics_are_updated_once(scheme, mode, norm):
    blocks = [conv_bn(norm) for _ in range(block_count(scheme, 6))]
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    twin, run = plain_twin(blocks, scheme)
    x = torch.randn(4, 3, 5, 5)
    for _ in range(2):
        got, exact = train_step(stack, stack, x), train_step(run, twin, x)
    assert_same_buffers(stack, twin)
    assert all(module.training for module in stack.modules())
    assert relative_error(got, exact) < {"exact": 1e-9, "checkpoint": 1e-15}.get(mode, 0.3)


@every_mode
def test_statistics_stay_in_eval_mode(scheme, mode):
    blocks = [conv_bn() for _ in range(block_count(scheme, 6))]
    stack = ResidualStack(blocks, scheme, **MODES[mode]).eval()
    twin, run = plain_twin(blocks, scheme)
    before = copy.deepcopy(dict(stack.named_buffers()))
    x = torch.randn(4, 3, 5, 5)
    got, exact = train_step(stack, stack, x), train_step(run, twin, x)
    assert all(torch.equal(before[name], buffer) for name, buffer in stack.named_buffers())
    assert relative_error(got, exact) < {"exact": 1e-12, "checkpoint": 1e-15}.get(mode, 0.3)


@every_mode
def test_dropout_draws_the_same_mask_every_time(scheme, mode):
    blocks = [nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(block_count(scheme, 6))]
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    x = torch.randn(5, 6)
    exact = train_step(lambda x: plain(blocks, scheme, x), stack, x)
    after_plain = torch.get_rng_state()
    got = train_step(stack, stack, x)
    assert torch.equal(torch.get_rng_state(), after_plain)
    # Other masks would be wrong by about 0.5; extrapolation cannot foresee masks at all.
    bound = {"exact": 1e-12, "checkpoint": 1e-15, "extrapolated": 0.4}.get(mode, 0.1)
    assert relative_error(got, exact) < bound


def test_dropout_costs_no_accuracy_in_order(scheme):
    errors = []
    for p in (0.0, 0.3):
        blocks = [nn.Sequential(mlp(), nn.Dropout(p)) for _ in range(block_count(scheme, 32))]
        stack = ResidualStack(blocks, scheme)
        x = torch.randn(5, 6)
        exact = train_step(lambda x, blocks=blocks: plain(blocks, scheme, x), stack, x)
        errors.append(relative_error(train_step(stack, stack, x), exact))
    assert errors[1] < 5 * errors[0]


@every_mode
def test_spectral_norm_iterates_once(scheme, mode):
    blocks = [mlp() for _ in range(block_count(scheme, 6))]
    for block in blocks:
        parametrizations.spectral_norm(block[0])
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    twin, run = plain_twin(blocks, scheme)
    x = torch.randn(5, 6)
    got, exact = train_step(stack, stack, x), train_step(run, twin, x)
    assert_same_buffers(stack, twin)
    assert relative_error(got, exact) < {"exact": 1e-12, "checkpoint": 1e-15}.get(mode, 0.3)


class Counting(nn.Module):
    """Depends on a buffer that it changes: by mutation, by replacement, or from nothing on first use."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = mlp(), how
        self.register_buffer("calls", None if how == "lazy" else torch.zeros(()))

    def forward(self, x):
        if self.calls is None:
            self.calls = torch.zeros(())
        if self.how == "replace":
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.body(x) * torch.cos(self.calls)


@every_mode
@pytest.mark.parametrize("how", ["mutate", "replace", "lazy"])
def test_other_buffers_are_seen_as_they_first_were(scheme, mode, how):
    blocks = [Counting(how) for _ in range(block_count(scheme, 6))]
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    twin, run = plain_twin(blocks, scheme)
    x = torch.randn(5, 6)
    for _ in range(2):
        got, exact = train_step(stack, stack, x), train_step(run, twin, x)
    assert_same_buffers(stack, twin)
    assert relative_error(got, exact) < {"exact": 1e-12, "checkpoint": 1e-15, "extrapolated": 0.5}.get(mode, 0.1)


class Tempered(nn.Module):
    """Reads buffers and writes none."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("temperature", torch.ones(1, 1))
        self.register_buffer("uses", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.body(x) * self.temperature


@pytest.mark.parametrize("mode", ["exact", "checkpoint"])
def test_buffers_given_by_functional_call_are_those_of_the_backward_pass_too(scheme, mode):
    blocks, x = [Tempered() for _ in range(block_count(scheme, 4))], torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    parameters = list(stack.parameters())
    given = {name: torch.full((1, 1), 3.0) for name, _ in stack.named_buffers() if "temperature" in name}
    got = torch.autograd.grad(half_square(torch.func.functional_call(stack, given, (x,))), parameters)
    stack.load_state_dict(given, strict=False)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    assert relative_error(got, exact) < 1e-9


@pytest.mark.parametrize("mode", ["exact", "checkpoint"])
def test_a_buffer_changed_between_forward_and_backward_is_an_error(scheme, mode):
    blocks, x = [Tempered() for _ in range(block_count(scheme, 4))], torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    for name in ("uses", "temperature"):
        loss = half_square(stack(x))
        getattr(blocks[1], name).add_(1)
        with pytest.raises(RuntimeError, match=f"buffers must not be modified, but '{name}' of shape"):
            loss.backward()


def test_cached_parametrizations_keep_their_gradients(scheme):
    blocks, x = [mlp() for _ in range(block_count(scheme, 4))], torch.randn(5, 6)
    for block in blocks:
        parametrizations.weight_norm(block[0])
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x) + blocks[0][0].weight.sum(), parameters)
    stack = ResidualStack(blocks, scheme, reverse=EXACT)
    with nn.utils.parametrize.cached():
        before = blocks[0][0].weight.sum()
        got = gradients(lambda: stack(x) + before, parameters)
    assert relative_error(got, exact) < 1e-12


def test_invert_changes_no_buffer(scheme):
    stack = ResidualStack([conv_bn() for _ in range(block_count(scheme, 4))], scheme)
    before = copy.deepcopy(dict(stack.named_buffers()))
    stack.invert(torch.randn(4, 3, 5, 5))
    assert all(torch.equal(before[name], buffer) for name, buffer in stack.named_buffers())


def test_flags_of_the_forward_pass_hold_in_the_backward_pass(scheme):
    blocks = [nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(block_count(scheme, 6))]
    blocks[1].eval()
    stack, x = ResidualStack(blocks, scheme, reverse=EXACT), torch.randn(5, 6)
    exact = train_step(lambda x: plain(blocks, scheme, x), stack, x)
    torch.manual_seed(5)
    loss = half_square(stack(x))
    stack.eval()
    blocks[2].train()
    flags = [module.training for module in stack.modules()]
    assert relative_error(torch.autograd.grad(loss, list(stack.parameters())), exact) < 1e-12
    assert [module.training for module in stack.modules()] == flags


@pytest.mark.parametrize("where", ["forward", "around"])
@pytest.mark.parametrize("mode", ["exact", "corrected", "extrapolated", "checkpoint"])
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(scheme, mode, where):
    """Within the noise of bf16, measured as autocast backprop's own distance from float32 backprop."""
    torch.set_default_dtype(torch.float32)
    blocks = [mlp(16, 32) for _ in range(block_count(scheme, 16))]
    stack, x = ResidualStack(blocks, scheme, **MODES[mode]), torch.randn(32, 16)
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)

    def under_autocast(run):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        if where == "around":
            with autocast:
                return gradients(lambda: run(x), parameters)
        with autocast:
            out = run(x)
        return torch.autograd.grad(half_square(out), parameters)

    noise = relative_error(under_autocast(lambda x: plain(blocks, scheme, x)), exact)
    solver_error = relative_error(gradients(lambda: stack(x), parameters), exact)
    assert relative_error(under_autocast(stack), exact) < 2 * noise + solver_error


def test_autocast_weight_cache_does_not_swallow_gradients(scheme):
    """A weight shared with a module outside, in one autocast region: the cast made without gradients must not be
    reused with them, nor the other way round."""
    torch.set_default_dtype(torch.float32)
    blocks, before, after = [mlp() for _ in range(block_count(scheme, 3))], nn.Linear(6, 10), nn.Linear(6, 10)
    before.weight = blocks[0][0].weight
    after.weight = blocks[1][0].weight
    parameters, x = parameters_of(blocks), torch.randn(5, 6)

    def model(run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return half_square(after(run(before(x)[:, :6]))).float()

    exact = torch.autograd.grad(model(lambda x: plain(blocks, scheme, x)), parameters)
    for options in ({"reverse": EXACT}, {"gradient": "checkpoint"}):
        stack = ResidualStack(blocks, scheme, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # backward inside the region too
            got = torch.autograd.grad(model(stack), parameters)
        errors = [relative_error([a], [b]) for a, b in zip(got, exact, strict=True)]
        assert max(errors) < 0.05


def test_replacing_a_parameter_between_forward_and_backward_does_not_matter(scheme):
    blocks, x = [mlp() for _ in range(block_count(scheme, 4))], torch.randn(5, 6)
    old = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x), old)
    loss = half_square(ResidualStack(blocks, scheme, reverse=EXACT)(x))
    replacement = nn.Parameter(torch.zeros_like(blocks[1][0].weight))
    blocks[1][0].weight = replacement
    assert relative_error(torch.autograd.grad(loss, old), exact) < 1e-12
    assert blocks[1][0].weight is replacement


class LetsGo(nn.Module):
    """A block that lets go of an object of its own when it first runs."""

    def __init__(self):
        super().__init__()
        self.inner, self.pending = nn.Linear(6, 6), object()

    def forward(self, x):
        self.pending = None
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize("options", [{}, {"reverse": "stored"}, {"gradient": "checkpoint"}], ids=str)
def test_an_object_that_became_none_is_there_when_the_block_runs_again(scheme, options):
    stack = ResidualStack([LetsGo() for _ in range(block_count(scheme, 3))], scheme, **options)
    half_square(stack(torch.randn(2, 6))).backward()
    assert all(block.pending is None for block in stack)
    assert all(parameter.grad is not None for parameter in stack.parameters())
