"""What torch.library, torch.compile and torch.func see of the depth-fused ops.

Most tests trace the forward and the backward pass (aot_eager) without generating code, which takes long.
"""

import pytest
import torch

from resode_cuda import ResidualMLP, Reverse
from resode_cuda.functional import residual_mlp
from tests.support.fused_networks import (
    EXACT,
    TIGHT,
    network,
    plain_gradients,
    run,
    state,
    wanted,
    worst_error,
)
from tests.support.networks import gradients, half_square

pytestmark = [
    # Dynamo looks at .grad of tensors that are no leaves and hides the warning, which pytest turns into an error first;
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # torch's forward mode scripts some decompositions on first use, and Inductor imports old parts of torch.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


# torch.library.


def fields(net):
    return *net.parameters, net.activation, net.norm, net.scheme, list(net.steps)


TESTS_WITHOUT_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("dtype", "bias"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)])
@pytest.mark.parametrize(
    ("gradient", "solver", "with_squares"),
    [
        ("adjoint", ("step", 0, False, False, [], False, []), False),
        ("adjoint", ("extrapolate", 2, True, True, [], False, [0]), False),
        ("adjoint", ("step", 0, True, False, [], False, []), True),
        ("adjoint", ("stored", 0, False, False, [4], False, [1]), False),
        ("adjoint", ("stored", 0, False, False, [4, 3], True, []), True),
        ("checkpoint", ("step", 0, True, False, [], False, []), False),
    ],
    ids=["paper", "anchors", "squares", "stored", "rounded", "checkpoint"],
)
def test_opcheck_of_the_forward_op(dtype, bias, gradient, solver, with_squares):
    net = network("heun", norm="rms", bias=bias, steps=2, dtype=dtype)
    x = state(net, 4)
    squares = torch.zeros(2, 2, dtype=torch.float64) if with_squares else None
    # Which differentiates every result, and increments and anchored states have no gradient.
    differentiable = {} if not (solver[4] or solver[6]) else {"test_utils": TESTS_WITHOUT_GRADIENTS}
    values = x, *fields(net), *solver, gradient, "torch", squares
    torch.library.opcheck(torch.ops.resode.mlp_stack, values, **differentiable)


@pytest.mark.parametrize(("dtype", "bias"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)])
@pytest.mark.parametrize("asked", [(True, True), (False, False)], ids=str)
def test_opcheck_of_the_adjoints(dtype, bias, asked):
    net = network("euler", bias=bias, steps=2, dtype=dtype)
    net = net.with_parameters([None if p is None else p.detach() for p in net.parameters])
    x = state(net, 4).detach()
    g = torch.randn_like(x)
    for solver in (("extrapolate", 1, True, False, [], False, [1]), ("stored", 0, False, False, [3], False, [0])):
        *kept, _ = torch.ops.resode.mlp_stack(x, *fields(net), *solver, "adjoint", "torch", None)
        values = g, *kept, *fields(net), *solver, *asked, "torch"
        torch.library.opcheck(torch.ops.resode.mlp_stack_adjoint, values)
    torch.library.opcheck(torch.ops.resode.mlp_stack_exact_adjoint, (g, x, *fields(net), asked[0], "torch"))


# torch.compile.

MODES = [
    {"reverse": "paper"},
    {"reverse": "corrected"},
    {"reverse": "extrapolated", "anchors": 2},
    {"reverse": "corrected", "anchors": (1,)},
    {"reverse": Reverse("step", corrections=2)},
    {"reverse": "stored", "anchors": 2},
    {"reverse": Reverse("stored", bits=4, rounded_forward=True)},
    {"gradient": "checkpoint"},
    {"gradient": "backprop"},
]


def whole(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_function_around_the_op(scheme, options):
    net = network(scheme, "gelu", "layer", steps=3)
    inputs = wanted(net, state(net, 5))

    def function(x, *parameters):
        return residual_mlp(x.sin(), *parameters, scheme, activation="gelu", norm="layer", **options).cos()

    expected, got = (gradients(lambda f=f: f(*inputs), inputs) for f in (function, whole(function)))
    assert worst_error(got, expected) < TIGHT


def recorder(graphs):
    """A backend that traces the backward pass too and keeps the forward graphs that it is given."""

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


@pytest.mark.parametrize("options", MODES[1:7], ids=str)
def test_one_graph_of_a_module_serves_every_batch_size(float64, scheme, options):
    mlp = ResidualMLP(6, 10, 3, scheme, norm="rms", on_drift="ignore", **options)
    graphs, counts = [], []
    compiled = whole(mlp, recorder(graphs), dynamic=True)
    for rows in (5, 3, 17):
        x = torch.randn(rows, 6, requires_grad=True)
        inputs = [x, *mlp.parameters()]
        expected, got = (gradients(lambda f=f, x=x: f(x), inputs) for f in (mlp, compiled))
        assert worst_error(got, expected) < TIGHT
        counts.append(len(graphs))
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("options", [{"reverse": "extrapolated"}, {"gradient": "checkpoint"}], ids=str)
def test_generated_code(float64, scheme, options):
    mlp = ResidualMLP(6, 10, 3, scheme, **options)
    x = torch.randn(5, 6, requires_grad=True)
    inputs = [x, *mlp.parameters()]
    expected, got = (gradients(lambda f=f: f(x), inputs) for f in (mlp, whole(mlp, "inductor")))
    assert worst_error(got, expected) < TIGHT


@pytest.mark.parametrize(
    ("options", "states"),
    [({"reverse": "corrected"}, 1), ({"reverse": "extrapolated"}, 3), ({"gradient": "checkpoint"}, 1)],
    ids=str,
)
def test_a_compiled_module_keeps_no_more_states_than_an_uncompiled_one(scheme, options, states):
    mlp, x, kept = ResidualMLP(6, 10, 8, scheme, **options), torch.randn(64, 6), {}
    own = {parameter.data_ptr() for parameter in mlp.parameters()}
    for function in (mlp, whole(mlp)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            function(x)
        assert sum(t.numel() for address, t in kept.items() if address not in own) == states * x.numel()


def test_without_gradients(float64, scheme):
    mlp, x = ResidualMLP(6, 10, 3, scheme), torch.randn(5, 6)
    compiled = whole(mlp)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(compiled(x), mlp(x), rtol=TIGHT, atol=TIGHT)


def test_under_autocast(scheme):
    mlp, x = ResidualMLP(6, 10, 3, scheme, reverse="extrapolated"), torch.randn(5, 6)
    inputs = list(mlp.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (gradients(lambda f=f: f(x), inputs) for f in (mlp, whole(mlp)))
    assert worst_error(got, expected) < 1e-6


def test_settings_may_change_between_training_steps(float64, scheme):
    mlp, x = ResidualMLP(6, 10, 3, scheme), torch.randn(5, 6)
    inputs, compiled = list(mlp.parameters()), whole(mlp)
    for reverse, gradient in (("paper", "adjoint"), ("corrected", "adjoint"), ("corrected", "checkpoint")):
        mlp.reverse, mlp.gradient = reverse, gradient
        expected, got = (gradients(lambda f=f: f(x), inputs) for f in (mlp, compiled))
        assert worst_error(got, expected) < TIGHT


def test_drift_is_not_measured_in_a_trace(scheme):
    mlp, x = ResidualMLP(6, 10, 3, scheme), torch.randn(5, 6)
    half_square(mlp(x)).backward()
    assert mlp.drift is not None
    half_square(whole(mlp)(x)).backward()
    assert mlp.drift is None


# Other derivatives, and torch.func.

SOLVERS = pytest.mark.parametrize("solver", [EXACT, "checkpoint"], ids=["adjoint", "checkpoint"])


@SOLVERS
def test_a_double_backward_is_refused_and_leaves_nothing_behind(scheme, solver):
    net = network(scheme)
    x, squares = state(net, 5), torch.zeros(5, 2, dtype=torch.float64)
    (g,) = torch.autograd.grad(half_square(run(net, x, solver, squares=squares)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'^mlp_stack: .*got a double backward .*use gradient="backprop"'):
        g.sum().backward()
    assert not squares.requires_grad


@SOLVERS
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_x(scheme, solver, dim):
    net = network(scheme, norm="layer")
    x = state(net, 5, 3)
    run_rows = lambda x: run(net, x, solver)  # noqa: E731
    got = torch.vmap(run_rows, in_dims=dim, out_dims=dim)(x)
    torch.testing.assert_close(got, run_rows(x), rtol=TIGHT, atol=TIGHT)
    assert worst_error(gradients(lambda: got, wanted(net, x)), plain_gradients(net, x)) < TIGHT


@pytest.mark.parametrize("place", range(4), ids=["weight_in", "bias_in", "weight_out", "bias_out"])
def test_vmap_over_parameters_is_refused(place):
    net = network()
    parameters = list(net.parameters)
    x, batched = state(net, 5).detach(), torch.stack([parameters[place]] * 2)

    def with_one(parameter):
        parameters[place] = parameter
        return run(net.with_parameters(parameters), x)

    with pytest.raises(NotImplementedError, match=r'mlp_stack: torch\.vmap must batch x alone, .*gradient="backprop"'):
        torch.vmap(with_one)(batched)


@SOLVERS
def test_a_batched_backward_pass_is_a_loop_or_refused(solver):
    net = network()
    x = state(net, 5)
    out, inputs = run(net, x, solver), wanted(net, x)
    seeds = torch.randn(3, *out.shape, dtype=out.dtype)

    def pulled(g):
        return torch.autograd.grad(out, inputs, g, retain_graph=True)

    got = torch.autograd.grad(out, inputs, seeds, is_grads_batched=True, retain_graph=True)
    assert worst_error(got, [torch.stack(each) for each in zip(*map(pulled, seeds), strict=True)]) < TIGHT
    with pytest.raises(NotImplementedError, match=r"mlp_stack: torch\.vmap must not reach its backward pass, .*sums"):
        torch.vmap(pulled)(seeds)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: half_square(f(x)))(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: half_square(f(x))))(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "hessian": lambda f, x: torch.func.hessian(lambda x: half_square(f(x)))(x),
}


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_other_derivatives_are_refused_and_backprop_has_them(float64, scheme, gradient, transform):
    mlp, x = ResidualMLP(4, 5, 2, scheme, gradient=gradient), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r'ResidualMLP: .*got a torch\.func transform .*use gradient="backprop"'):
        transform(mlp, x)
    mlp.gradient = "backprop"
    blocks = mlp.to_blocks()
    blocks.gradient = "backprop"
    torch.testing.assert_close(transform(mlp, x), transform(blocks, x), rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_forward_mode_where_reverse_mode_is_off(float64, scheme, gradient):
    mlp, x, tangent = ResidualMLP(4, 5, 2, scheme, gradient=gradient), torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(mlp(dual)).tangent
    mlp.gradient = "backprop"
    expected = torch.func.jvp(mlp, (x,), (tangent,))[1]
    torch.testing.assert_close(got, expected, rtol=TIGHT, atol=TIGHT, check_device=False)
    assert expected.requires_grad
