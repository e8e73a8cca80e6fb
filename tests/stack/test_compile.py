"""torch.compile of models that hold a stack: traced whole where its blocks allow it, else right with a graph break.

Most tests trace the forward and the backward pass (aot_eager) without generating code, which takes long.
"""

import copy

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.exact import TIGHT, exact_stack
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Dynamo looks at .grad of tensors that are no leaves and hides the warning, which pytest turns into an error first;
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # it makes an instance of every autograd.Function that it traces; and Inductor imports old parts of torch.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def whole(stack, backend="aot_eager", **options):
    return torch.compile(stack, fullgraph=True, backend=backend, **options)


def recorder(graphs):
    """A backend that traces nothing further and keeps what it is given."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


class Conditioned(nn.Module):
    """A block with tensors among its arguments, one of which it adds unscaled."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, scale, more):
        return self.body(x) * scale + more["shift"][0]


STEPS = [0.3, 0.2, 0.4]


@pytest.mark.parametrize(
    ("options", "needs_x"),
    [
        ({"reverse": "paper"}, True),
        ({"reverse": "corrected"}, False),
        ({"reverse": "extrapolated"}, True),
        ({"reverse": Reverse("extrapolate", corrections=2), "anchors": 2}, False),
        ({"anchors": {0, 2}}, True),
        ({"gradient": "checkpoint"}, True),
        ({"gradient": "backprop"}, False),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_stack_itself(scheme, options, needs_x):
    blocks = [Conditioned() for _ in range(block_count(scheme, len(STEPS)))]
    stack = ResidualStack(blocks, scheme, step=STEPS, on_drift="ignore", **options)
    x = torch.randn(5, 6, requires_grad=needs_x)
    scale, shift = torch.randn(6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    wanted = [scale, shift, *parameters_of(blocks), *[x] * needs_x]
    run = whole(stack)
    expected = gradients(lambda: stack(x, scale, more={"shift": [shift]}), wanted)
    assert relative_error(gradients(lambda: run(x, scale, more={"shift": [shift]}), wanted), expected) < TIGHT


@pytest.mark.parametrize("stream_dtype", [None, torch.float64])
def test_dtypes_of_state_and_stream(scheme, stream_dtype):
    blocks = [block.float() for block in mlps(scheme, 3)]
    stack = ResidualStack(blocks, scheme, stream_dtype=stream_dtype)
    x = torch.randn(5, 6, dtype=torch.float32, requires_grad=True)
    wanted = [x, *parameters_of(blocks)]
    expected = gradients(lambda: stack(x), wanted)
    got = gradients(lambda: whole(stack)(x), wanted)
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    assert relative_error(got, expected) < 1e-6


def test_one_graph_serves_every_batch_size(scheme):
    stack = ResidualStack(mlps(scheme, 2), scheme, reverse="extrapolated")
    wanted, graphs = list(stack.parameters()), []
    run = whole(stack, recorder(graphs), dynamic=True)
    for rows in (5, 3, 17):
        x = torch.randn(rows, 6)
        assert relative_error(gradients(lambda: run(x), wanted), gradients(lambda: stack(x), wanted)) < TIGHT  # noqa: B023
    assert len(graphs) == 1


def test_without_gradients(scheme):
    stack, x = ResidualStack(mlps(scheme, 3), scheme), torch.randn(5, 6)
    run = whole(stack)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(run(x), stack(x), rtol=TIGHT, atol=TIGHT)


def test_settings_may_change_between_training_steps(scheme):
    stack, x = ResidualStack(mlps(scheme, 3), scheme, reverse="paper"), torch.randn(5, 6)
    wanted, run = list(stack.parameters()), whole(stack)
    for reverse, gradient in (("paper", "adjoint"), ("corrected", "adjoint"), ("corrected", "checkpoint")):
        stack.reverse, stack.gradient = reverse, gradient
        assert relative_error(gradients(lambda: run(x), wanted), gradients(lambda: stack(x), wanted)) < TIGHT


def saved(run, x, stack):
    """States that are kept for the backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        run(x)
    own = {parameter.data_ptr() for parameter in stack.parameters()}
    return sum(tensor.numel() for address, tensor in kept.items() if address not in own) / x.numel()


class NoBias(nn.Module):
    """Ends with a matrix product, which Inductor merges with additions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_generated_code_keeps_no_states(scheme, reverse):
    found = []
    for steps in (2, 5) if scheme == "euler" and reverse == "corrected" else (3,):
        torch._dynamo.reset()
        stack = ResidualStack([NoBias() for _ in range(block_count(scheme, steps))], scheme, reverse=reverse)
        x = torch.randn(64, 6)
        wanted, run = list(stack.parameters()), whole(stack, "inductor")
        expected = gradients(lambda: stack(x), wanted)  # noqa: B023
        assert relative_error(gradients(lambda: run(x), wanted), expected) < TIGHT  # noqa: B023
        found.append(saved(run, x, stack))
    assert set(found) == {1.0 if reverse == "corrected" else 3.0}


class Hooked(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.register_forward_hook(lambda module, args, out: out.tanh())


RANDOM = {
    "dropout": lambda: nn.Sequential(mlp(), nn.Dropout(0.5)),
    "batch norm": lambda: nn.Sequential(mlp(), nn.BatchNorm1d(6)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "hook": Hooked,
}


def graphs_and_error(stack, x, around=None):
    """How many graphs a compiled model with the stack consists of, and how far off its gradients are."""
    head = nn.Linear(6, 6)
    around = around or (lambda run: run)
    wanted, graphs = [*head.parameters(), *stack.parameters()], []
    model = lambda: head(around(stack)(head(x)))  # noqa: E731
    before = copy.deepcopy(stack.state_dict())
    torch.manual_seed(7)
    expected = gradients(model, wanted)
    stack.load_state_dict(before)
    torch.manual_seed(7)
    got = gradients(torch.compile(model, backend=recorder(graphs)), wanted)
    return len(graphs), relative_error(got, expected)


@pytest.mark.parametrize("kind", RANDOM)
def test_blocks_that_draw_numbers_or_write_buffers_run_uncompiled(scheme, kind):
    stack = ResidualStack([RANDOM[kind]() for _ in range(block_count(scheme, 3))], scheme)
    graphs, error = graphs_and_error(stack, torch.randn(5, 6))
    assert graphs == 2  # before the stack and after it
    assert error < TIGHT


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_in_eval_mode_they_are_traced(scheme, kind):
    stack = ResidualStack([RANDOM[kind]() for _ in range(block_count(scheme, 2))], scheme).eval()
    graphs, error = graphs_and_error(stack, torch.randn(5, 6))
    assert (graphs, error < TIGHT) == (1, True)


@pytest.mark.parametrize("options", [{"keep_input": True}, {"on_drift": "raise"}, {"on_drift": "checkpoint"}])
def test_a_stack_that_is_to_be_watched_runs_uncompiled(scheme, options):
    stack = ResidualStack(mlps(scheme, 3), scheme, max_drift=1.0, **options)
    assert graphs_and_error(stack, torch.randn(5, 6))[0] == 2
    assert stack.drift is not None


def test_drift_is_not_measured_in_a_trace(scheme):
    stack, x = ResidualStack(mlps(scheme, 2), scheme), torch.randn(5, 6)
    half_square(stack(x)).backward()
    assert stack.drift is not None
    half_square(whole(stack)(x)).backward()
    assert stack.drift is None


def test_autocast_runs_uncompiled(scheme):
    stack = ResidualStack([block.float() for block in mlps(scheme, 2)], scheme)
    x, wanted = torch.randn(5, 6, dtype=torch.float32), list(stack.parameters())
    graphs = []
    run = torch.compile(stack, backend=recorder(graphs))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (gradients(lambda: f(x), wanted) for f in (stack, run))  # noqa: B023
    assert relative_error(got, expected) == 0
    assert not graphs


class Noise(nn.Module):
    """Draws numbers by a function, which nothing about the module tells."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return nn.functional.dropout(self.body(x), 0.5, self.training)


class Counting(Noise):
    """Writes a buffer, and reads it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls.cos()


@pytest.mark.parametrize("block", [Noise, Counting])
def test_blocks_that_are_no_functions_run_uncompiled(scheme, block):
    stack = ResidualStack([block() for _ in range(block_count(scheme, 3))], scheme, on_drift="ignore")
    for _ in range(3):
        torch._dynamo.reset()
        graphs, error = graphs_and_error(stack, torch.randn(5, 6))
        assert graphs == 2
        assert error < TIGHT


def test_blocks_that_are_functions_are_traced_once_that_is_known(scheme):
    stack, x = ResidualStack([Noise().eval() for _ in range(block_count(scheme, 3))], scheme), torch.randn(5, 6)
    graphs = []
    run = torch.compile(lambda x: stack(x.sin()).cos(), backend=recorder(graphs))
    for count in (2, 3, 3):
        half_square(run(x)).backward()
        assert len(graphs) == count


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
