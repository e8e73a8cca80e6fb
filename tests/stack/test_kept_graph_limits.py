"""Stored increments: blocks, hooks and arguments for which a kept graph must step back or be given up."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.memory import held
from tests.support.networks import mlp
from tests.support.stored_networks import DIM, SCHEMES, ordinary

STEPS = 4


class Block(nn.Module):
    """A block by a function of itself and its input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inner, self.outer = function, nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x, *args):
        return self.function(self, x, *args)


def stack_of(function, scheme="euler", **options):
    """Exact: all states are kept."""
    options = {"reverse": "stored", "anchors": 1, **options}
    return ordinary([Block(function) for _ in range(STEPS + (scheme == "heun"))], scheme, **options).double()


def points(rows=4):
    return torch.randn(rows, DIM, dtype=torch.float64, requires_grad=True)


def exact_of(stack):
    exact = copy.deepcopy(stack)
    exact.gradient = "backprop"
    return exact


def gradients_of(stack, x, *args):
    wanted = [tensor for tensor in (x, *args, *stack.parameters()) if tensor.requires_grad]
    return torch.autograd.grad(stack(x, *args).sin().sum(), wanted, allow_unused=True)


def assert_exact(stack, x, *args, passes=3):
    expected = gradients_of(exact_of(stack), x, *args)
    for _ in range(passes):
        for a, b in zip(gradients_of(stack, x, *args), expected, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def perceptron(block, x):
    return block.outer(block.inner(x).tanh())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_that_come_between_forward_and_backward_are_called_once(scheme):
    stack = stack_of(perceptron, scheme)
    exact, x = exact_of(stack), points()
    for _ in range(3):
        found = []
        for network in (stack, exact):
            network.zero_grad()
            loss, calls = network(x).sin().sum(), []
            hook = network[1].inner.weight.register_hook(lambda g, calls=calls: (calls.append(1), g / 2)[1])
            loss.backward()
            hook.remove()
            assert len(calls) == 1
            found.append([parameter.grad for parameter in network.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_attributes_of_arguments_pass_from_block_to_block(needs_gradient, is_leaf):
    def counting(block, x, c):
        c.uses = getattr(c, "uses", 0) + 1
        return perceptron(block, x) * c * c.uses

    def argument():
        c = torch.full((DIM,), 0.1, dtype=torch.float64, requires_grad=needs_gradient)
        return c if is_leaf else c * 1.0

    stack, x = stack_of(counting), points()
    exact = exact_of(stack)
    for _ in range(2):
        mine, theirs = argument(), argument()
        assert torch.equal(stack(x, mine), exact(x, theirs))
        assert mine.uses == theirs.uses == STEPS
    gradients = [torch.autograd.grad(network(x, argument()).sum(), [x])[0] for network in (stack, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


def test_blocks_see_one_object_for_an_argument():
    seen = []

    def noting(block, x, c):
        seen.append(id(c))
        return perceptron(block, x) * c

    stack, c = stack_of(noting), torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    stack(points(), c * 1.0)
    assert len(set(seen)) == 1


def test_experts_that_change_places_get_gradients_of_their_own():
    def routed(block, x):
        return block.inner(x).tanh() if float(x.sum()) < block.limit else block.outer(x).tanh()

    stack, x = stack_of(routed, anchors=None), points()
    with torch.no_grad():
        state = x
        for block in stack:
            block.limit = float(state.sum()) + 1e-9  # the companion lies on either side
            state = state + block(state)
    found = [dict(zip(stack.state_dict(), gradients_of(stack, x)[1:], strict=True)) for _ in range(3)]
    for gradients in found:
        for n in range(STEPS):
            for name in ("inner", "outer"):
                g = gradients[f"{n}.{name}.weight"]
                # Either no gradient, or one that the expert's own activations lead to.
                assert g is None or torch.equal(g, found[0][f"{n}.{name}.weight"])
            assert (gradients[f"{n}.inner.weight"] is None) != (gradients[f"{n}.outer.weight"] is None)


@pytest.mark.parametrize(
    "way",
    [
        lambda block, x: checkpoint(lambda z: block.inner(z).tanh().sin(), z=x, use_reentrant=False),
        lambda block, x: checkpoint(lambda: block.inner(x).tanh().sin(), use_reentrant=False),
        lambda block, x: checkpoint(lambda zs: block.inner(zs[0]).tanh().sin(), (x,), use_reentrant=False),
        lambda block, x: checkpoint(block.inner, x, use_reentrant=False).tanh(),
    ],
    ids=["keyword", "closure", "tuple", "positional"],
)
def test_checkpoints_inside_hold_no_state(way):
    def of_depth(steps):
        stack, x = ordinary([Block(way) for _ in range(steps)], reverse="stored").double(), points(256)
        gradients_of(stack, x)
        return held(stack, x) / (256 * DIM * 8)

    assert (of_depth(12) - of_depth(4)) / 8 < 0.3  # of a state, for each step more
    assert_exact(stack_of(way), points())


class AsksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w).sin()

    @staticmethod
    def backward(ctx, g):
        g = g * (ctx.saved_tensors[0] * ctx.saved_tensors[1]).cos()
        return g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum(0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_functions_that_ask_for_their_tensors_twice(scheme):
    def asking(block, x):
        return block.outer(AsksTwice.apply(block.inner(x) + 0, block.inner.bias * 1))

    stack = stack_of(asking, scheme)
    assert_exact(stack, points())
    assert all(block.needs_its_tensors for block in stack._blocks_for(points()))


def test_torchscript_functions_at_the_end_of_a_block():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        @torch.jit.script
        def ending(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.tanh(a * b)

    assert_exact(stack_of(lambda block, x: ending(block.inner(x), block.outer(x))), points())


def test_shapes_that_depend_on_the_data_inside_a_checkpoint():
    def scattered(block, x):
        h = block.inner(x)
        out, kept = torch.zeros_like(h), h > 0
        out[kept] = h[kept].sin()
        return block.outer(out)

    def checkpointed(block, x):
        return checkpoint(scattered, block, x, use_reentrant=False)

    stack, x = stack_of(checkpointed, anchors=None), points(1024)
    expected = gradients_of(exact_of(stack), x)
    for _ in range(3):
        difference = sum((a - b).square().sum() for a, b in zip(gradients_of(stack, x), expected, strict=True))
        assert difference < 1e-4 * sum(b.square().sum() for b in expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda block, x: block.outer(
            torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(block.inner(x))).relu(), 0.0)
        ),
        lambda block, x: _without_hooks(block, x),
    ],
    ids=["nested", "hooks disabled"],
)
def test_blocks_whose_tensors_can_not_be_left_out(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_exact(stack_of(function), points())


def _without_hooks(block, x):
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        return perceptron(block, x)


def test_a_block_that_differentiates_inside_at_another_state_alone():
    runs = []

    def sometimes(block, x):
        runs.append(1)
        h = block.inner(x)
        if len(runs) % (2 * STEPS) >= STEPS + 1:  # in re-evaluations
            torch.autograd.grad(h.tanh().sum(), block.inner.weight, retain_graph=True)
        return block.outer(h.tanh())

    stack, x = stack_of(sometimes), points()
    expected = gradients_of(exact_of(stack_of(sometimes)), x)
    assert all(g is not None for g in expected)
    runs.clear()
    first = gradients_of(stack, x)
    runs.clear()
    for a, b in zip(gradients_of(stack, x), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_inputs_made_in_inference_mode():
    stack = stack_of(perceptron, anchors=None)
    with torch.inference_mode():
        x = torch.randn(4, DIM, dtype=torch.float64)
    found = [torch.autograd.grad(stack(y).sum(), list(stack.parameters())) for y in (x, x, x.clone())]
    for gradients in zip(*found, strict=True):
        assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_hooks_of_modules_come_in_pairs():
    stack, depth = stack_of(perceptron, anchors=None), []
    for block in stack:
        block.inner.register_forward_pre_hook(lambda module, args: depth.append(1))
        block.inner.register_forward_hook(lambda module, args, out: depth.pop() and None)
        block.outer.register_forward_pre_hook(lambda module, args: depth.append(1))
        block.outer.register_forward_hook(lambda module, args, out: depth.pop() and None)
    for _ in range(3):
        gradients_of(stack, points())
        assert depth == []


def test_a_block_that_fails_once_for_another_reason_keeps_its_graph_later():
    fails = [True]

    def failing(block, x):
        if fails:
            fails.clear()
            raise ValueError("out of luck")
        return perceptron(block, x)

    stack, x = stack_of(failing), points()
    stack(x)  # run again without a graph, which went well: taken for a block that needs its tensors
    fails.append(True)
    fails_always = stack_of(lambda block, x: (_ for _ in ()).throw(ValueError("always")))
    with pytest.raises(ValueError, match="always"):
        fails_always(x)
    assert not fails_always._inventories.needing_tensors


@pytest.mark.parametrize("way", ["checkpoint around the stack", "a forward pass without a backward pass"])
def test_turns_are_taken_by_backward_passes(way):
    stack, x = stack_of(perceptron, anchors=None), points()
    gradients_of(stack, x)
    turns = []
    for n in range(STEPS):
        before = stack.drift.changes
        y = x * (n + 2)
        if way.startswith("checkpoint"):
            checkpoint(stack, y, use_reentrant=False).sum().backward()
        else:
            stack(y)
            stack(y).sum().backward()
        turns += (stack.drift.changes != before).nonzero().flatten().tolist()
    assert sorted(turns) == [0, 1, 2, 3]


def test_a_first_pass_that_does_not_reach_all_steps_leaves_them_to_be_measured():
    stack, x = stack_of(perceptron, anchors=None), points().detach()
    stack[0].requires_grad_(False)
    stack[1].requires_grad_(False)
    gradients_of(stack, x)
    assert stack.drift.changes.isfinite().tolist() == [False, False, True, True]
    stack.requires_grad_(True)
    gradients_of(stack, x)
    assert stack.drift.changes.isfinite().all()


def test_an_error_in_the_backward_pass_holds_no_tensors():
    calls = []

    def failing(block, x):
        calls.append(1)
        if len(calls) > STEPS:
            raise ValueError("broken on purpose")
        return perceptron(block, x)

    stack = stack_of(failing, anchors=None)
    out = stack(points())
    with pytest.raises(ValueError, match="on purpose"):
        out.sum().backward()
    node, graphs = out.grad_fn, []
    while node is not None:
        graphs += [g for g in getattr(getattr(node, "graph", None), "blocks", []) if g is not None]
        node = next((n for n, _ in node.next_functions if n is not None), None)
    assert graphs
    assert not any(graph._saved._tensors for graph in graphs)


def test_compiled_blocks_compile_nothing_of_this_library():
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    stack = ordinary([mlp(DIM, 8) for _ in range(2)], reverse="stored").double()
    for block in stack:
        block.compile(backend="eager")
    for _ in range(3):
        gradients_of(stack, points())
    assert counter["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()
