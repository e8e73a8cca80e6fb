"""What a stack returns beside x_N: states in between, and the auxiliaries of its blocks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import block_count, mlp, mlps, parameters_of, plain, relative_error
from tests.support.stateful import assert_same_buffers

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

MODES = {
    "converged": {"reverse": EXACT},
    "paper": {"reverse": "paper", "anchors": 1},
    "corrected": {"reverse": "corrected", "anchors": 1},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
    "some anchors": {"reverse": EXACT, "anchors": {0, 3}},
    "checkpoint": {"gradient": "checkpoint"},
    "backprop": {"gradient": "backprop"},
}
every_mode = pytest.mark.parametrize("mode", MODES)
STEPS = 5
TOLERANCE = 1e-11


def states_of(blocks, scheme, x):
    """x_0 to x_N of the ordinary network."""
    found = [x]
    for n in range(STEPS):
        found.append(plain(blocks[n : n + SCHEMES[scheme].blocks_per_step], scheme, found[-1], h=1 / STEPS))
    return found


def loss_of(tensors):
    """A loss that tells the tensors apart."""
    return sum((n + 1) * tensor.square().sum() for n, tensor in enumerate(tensors))


def assert_same(got, exact, inputs):
    """The outputs to the last bit, and the gradients of a loss of all of them."""
    assert len(got) == len(exact)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    wanted = torch.autograd.grad(loss_of(exact), inputs, allow_unused=True)
    found = torch.autograd.grad(loss_of(got), inputs, allow_unused=True)
    assert [g is None or not g.any() for g in found] == [g is None or not g.any() for g in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
    assert relative_error(*zip(*pairs, strict=True)) < TOLERANCE


USES = {
    "one inner state": ([2], False),
    "the input": ([0], False),
    "the output twice": ([STEPS, STEPS], False),
    "one state twice": ([3, 3], True),
    "several": ([4, 1, 3], False),
    "several and the output": ([1, 4], True),
    "all": ([*range(STEPS + 1)], True),
}


@every_mode
@pytest.mark.parametrize("use", USES)
def test_states_in_between_are_those_of_the_plain_loop_with_their_gradients(scheme, mode, use):
    wanted, with_last = USES[use]
    blocks, x = mlps(scheme, STEPS), torch.randn(4, 6, requires_grad=True)
    last, states = ResidualStack(blocks, scheme, **MODES[mode])(x, return_states=wanted)
    all_states = states_of(blocks, scheme, x)
    exact = [all_states[n] for n in wanted]
    assert torch.equal(last, all_states[-1])
    assert_same(states + [last] * with_last, exact + all_states[-1:] * with_last, [x, *parameters_of(blocks)])


@pytest.mark.parametrize("mode", ["converged", "extrapolated", "checkpoint"])
def test_states_have_gradients_where_the_input_has_none(scheme, mode):
    blocks, x = mlps(scheme, STEPS), torch.randn(4, 6)
    _, states = ResidualStack(blocks, scheme, **MODES[mode])(x, return_states=[2, 4])
    exact = states_of(blocks, scheme, x)
    assert_same(states, [exact[2], exact[4]], parameters_of(blocks))


@pytest.mark.parametrize("mode", ["converged", "extrapolated", "checkpoint"])
def test_each_of_several_losses_may_have_a_backward_pass_of_its_own(scheme, mode):
    blocks, x = mlps(scheme, STEPS), torch.randn(4, 6, requires_grad=True)
    last, states = ResidualStack(blocks, scheme, **MODES[mode])(x, return_states=[1, 3])
    exact, inputs = states_of(blocks, scheme, x), [x, *parameters_of(blocks)[:4]]
    for got, wanted in ((states[1], exact[3]), (last, exact[-1]), (states[0], exact[1])):
        found = torch.autograd.grad(loss_of([got]), inputs, retain_graph=True)
        expected = torch.autograd.grad(loss_of([wanted]), inputs, retain_graph=True)
        assert relative_error(found, expected) < TOLERANCE


def test_states_come_without_gradients_too_and_none_may_be_asked_for(scheme):
    blocks, x = mlps(scheme, STEPS), torch.randn(4, 6)
    stack = ResidualStack(blocks, scheme)
    with torch.no_grad():
        _, states = stack(x, return_states=range(STEPS + 1))
    for state, exact in zip(states, states_of(blocks, scheme, x), strict=True):
        assert torch.equal(state, exact)
    last, states = stack(x, return_states=[])
    assert torch.equal(last, stack(x))
    assert states == []


@pytest.mark.parametrize("wrong", [-1, STEPS + 1, 1.0, True, "2"])
def test_numbers_that_no_state_has_are_refused(scheme, wrong):
    stack = ResidualStack(mlps(scheme, STEPS), scheme)
    with pytest.raises(ValueError, match=f"return_states must be numbers from 0 to {STEPS}, got {wrong!r}"):
        stack(torch.randn(4, 6), return_states=[0, wrong])


class Routed(nn.Module):
    """Returns a balancing loss of each sample beside its increment, if it has one."""

    def __init__(self, has_auxiliary=True):
        super().__init__()
        self.body, self.router, self.dropout = mlp(), nn.Linear(6, 3), nn.Dropout(0.3)
        self.has_auxiliary = has_auxiliary
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        gates = self.router(self.dropout(x)).softmax(dim=-1)
        out = self.body(x) * gates[:, :1]
        return (out, gates.square().mean(dim=-1) * self.calls.item()) if self.has_auxiliary else out


class Watched(nn.Module):
    """Gives the ordinary network what the block returns beside its increment by another way."""

    def __init__(self, block, found):
        super().__init__()
        self.block, self.found = block, [found]

    def forward(self, x):
        out = self.block(x)
        if isinstance(out, tuple):
            self.found[0].append(out[1])
            return out[0]
        return out


def routed(scheme):
    """Blocks of which the second and the last return no auxiliary."""
    count = block_count(scheme, STEPS)
    return [Routed(n not in (1, count - 1)) for n in range(count)]


def plain_outputs(blocks, scheme, x):
    """x_N, and the auxiliaries in the order of evaluation."""
    torch.manual_seed(3)
    found = []
    return plain([Watched(block, found) for block in blocks], scheme, x), found


def stack_outputs(stack, x, **options):
    torch.manual_seed(3)
    return stack(x, **options)


REDUCTIONS = {"sum": sum, "weighted": lambda found: sum((n + 1) * a.exp().mean() for n, a in enumerate(found))}
AIMS = {"total": (False, True), "output": (True, False), "both": (True, True)}


@every_mode
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("aim", AIMS)
def test_auxiliaries_are_those_of_the_plain_loop_with_their_gradients(scheme, mode, reduction, aim):
    blocks, x = routed(scheme), torch.randn(4, 6, requires_grad=True)
    twin = nn.ModuleList(copy.deepcopy(blocks))
    stack = ResidualStack(blocks, scheme, auxiliary=REDUCTIONS[reduction], **MODES[mode])
    last, found = plain_outputs(twin, scheme, x)
    exact, got = (last, REDUCTIONS[reduction](found)), stack_outputs(stack, x)
    exact, got = ([one for one, use in zip(both, AIMS[aim], strict=True) if use] for both in (exact, got))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    wanted = torch.autograd.grad(loss_of(exact), [x, *parameters_of(twin)], allow_unused=True, materialize_grads=True)
    inputs = [x, *parameters_of(blocks)]
    found = torch.autograd.grad(loss_of(got), inputs, allow_unused=True, materialize_grads=True)
    assert relative_error(found, wanted) < TOLERANCE
    assert_same_buffers(stack, twin)


@every_mode
@pytest.mark.parametrize("aim", ["total and a state", "state"])
def test_losses_of_auxiliaries_and_states_have_the_plain_gradients(scheme, mode, aim):
    blocks, x = routed(scheme), torch.randn(4, 6, requires_grad=True)
    twin = nn.ModuleList(copy.deepcopy(blocks))
    _, total, (state,) = stack_outputs(
        ResidualStack(blocks, scheme, auxiliary=sum, **MODES[mode]), x, return_states=[2]
    )
    found, kept = [], []
    torch.manual_seed(3)
    watched = [Watched(block, found) for block in twin]
    exact_state = x
    for n in range(STEPS):
        used = watched[n : n + SCHEMES[scheme].blocks_per_step]
        exact_state = plain(used, scheme, exact_state, h=1 / STEPS)
        kept.append(exact_state)
    exact = [sum(found), kept[1]] if aim == "total and a state" else [kept[1]]
    got = [total, state] if aim == "total and a state" else [state]
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(loss_of(exact), [x, *parameters_of(twin)], **options)
    assert relative_error(torch.autograd.grad(loss_of(got), [x, *parameters_of(blocks)], **options), wanted) < TOLERANCE


@pytest.mark.parametrize("mode", ["converged", "extrapolated", "checkpoint"])
def test_a_batch_of_gradients_of_a_total(scheme, mode):
    blocks, x = nn.ModuleList(routed(scheme)).eval(), torch.randn(4, 6, requires_grad=True)
    twin = copy.deepcopy(blocks)
    _, total = stack_outputs(ResidualStack(blocks, scheme, auxiliary=sum, **MODES[mode]), x)
    (got,) = torch.autograd.grad(total, x, torch.eye(4), is_grads_batched=True)
    exact = [
        torch.autograd.grad(sum(plain_outputs(copy.deepcopy(twin), scheme, x)[1]), x, row)[0] for row in torch.eye(4)
    ]
    assert relative_error(got, exact) < TOLERANCE


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_a_stack_without_any_auxiliary_says_so(scheme, gradient):
    stack = ResidualStack(mlps(scheme, STEPS), scheme, gradient=gradient, auxiliary=sum)
    with pytest.raises(TypeError, match=r"at least one block must return .*leave auxiliary out"):
        stack(torch.randn(4, 6))


class Returning(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = [out]

    def forward(self, x):
        return self.out[0](x)


@pytest.mark.parametrize(
    "out", [lambda x: (x, x, x), lambda x: (x, 1.0), lambda x: (x, x.argmax())], ids=["three", "number", "integer"]
)
def test_other_tuples_are_refused(scheme, out):
    blocks = [*mlps(scheme, STEPS - 1), Returning(out)]
    with pytest.raises(
        TypeError, match=r"must return \(increment, auxiliary\), floating tensors or None for the second, got"
    ):
        ResidualStack(blocks, scheme, auxiliary=sum)(torch.randn(4, 6))
    with pytest.raises(TypeError, match=r"must return one tensor, got tuple; .*with auxiliary=sum"):
        ResidualStack(blocks, scheme)(torch.randn(4, 6))


def test_auxiliary_must_be_a_function_and_a_fused_network_has_none(scheme):
    with pytest.raises(TypeError, match="auxiliary must be a function of a list of tensors, got 'sum'; use sum"):
        ResidualStack(mlps(scheme, STEPS), scheme, auxiliary="sum")
    mlp = ResidualMLP(6, 10, STEPS, scheme)
    with pytest.raises(ValueError, match=r"from_blocks needs a stack with .*auxiliary=None"):
        ResidualMLP.from_blocks(ResidualStack(mlp.to_blocks(), scheme, auxiliary=sum))


def total_of(found):
    return sum(auxiliary.mean() for auxiliary in found)


@pytest.mark.parametrize("mode", ["converged", "checkpoint", "backprop"])
def test_copies_and_compiled_stacks_return_the_same(scheme, mode):
    torch._dynamo.reset()  # what it has learned of the same frames from other tests
    blocks, x = nn.ModuleList(routed(scheme)).eval(), torch.randn(4, 6, requires_grad=True)
    stack = ResidualStack(blocks, scheme, auxiliary=total_of, **MODES[mode])
    runs = [
        copy.deepcopy(stack),
        pickle.loads(pickle.dumps(stack)),
        torch.compile(copy.deepcopy(stack), backend="eager"),
    ]
    last, total, states = stack(x, return_states=[1])
    exact = torch.autograd.grad(loss_of([last, total, *states]), x)
    for run in runs:
        got_last, got_total, got_states = run(x, return_states=[1])
        assert torch.equal(got_last, last)
        assert torch.equal(got_total, total)
        assert torch.equal(got_states[0], states[0])
        got = torch.autograd.grad(loss_of([got_last, got_total, *got_states]), x)
        assert relative_error(got, exact) < TOLERANCE


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_a_compiled_stack_without_auxiliaries_returns_states_too(scheme, gradient):
    stack, x = ResidualStack(mlps(scheme, STEPS), scheme, gradient=gradient), torch.randn(4, 6, requires_grad=True)
    last, states = torch.compile(lambda x: stack(x, return_states=[2]), backend="eager")(x)
    exact_last, exact = stack(x, return_states=[2])
    assert torch.equal(last, exact_last)
    assert torch.equal(states[0], exact[0])
    got, wanted = (torch.autograd.grad(loss_of([one]), x)[0] for one in (states[0], exact[0]))
    assert torch.equal(got, wanted)
