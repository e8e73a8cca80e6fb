"""Training steps that a CUDA graph captures. Without a GPU the stack is only told that one does."""

import gc

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.networks import (
    block_count,
    half_square,
    mlp,
    mlps,
    parameters_of,
    pretend_to_capture,
    relative_error,
)


@pytest.fixture
def capturing(monkeypatch):
    pretend_to_capture(monkeypatch)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        x = x.view(1, 1, *x.shape)
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)[0, 0]


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("drawing", [nn.Dropout(), FunctionalDropout(), Attention(0.5)], ids=lambda b: type(b).__name__)
def test_blocks_must_not_draw(capturing, gradient, drawing):
    stack = ResidualStack([mlp(), nn.Sequential(mlp(), drawing)], gradient=gradient)
    with pytest.raises(RuntimeError, match="must not draw random numbers while a CUDA graph is captured, got aten"):
        stack(torch.randn(3, 6))


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("quiet", [nn.Dropout(0.0), nn.Dropout().eval(), Attention(0.0)], ids=repr)
def test_blocks_that_could_draw_and_do_not(capturing, gradient, quiet):
    stack = ResidualStack([mlp(), nn.Sequential(mlp(), quiet)], gradient=gradient)
    half_square(stack(torch.randn(3, 6))).backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_the_device_is_not_asked_for_its_random_state(capturing, monkeypatch):
    """Which a generator does not tell while a graph is captured."""
    from resode_cuda.adjoint.generators import Generators
    from resode_cuda.adjoint.inventory import Inventory
    from resode_cuda.adjoint.replay import Replayed

    module = mlp()
    device, x = torch.device("cuda", 0), torch.randn(3, 6)
    replayed = Replayed(Inventory(module), device, Generators(device))
    assert torch.equal(replayed.record(lambda: module(x)), replayed.again(lambda: module(x)))


def test_drift_is_measured_and_not_judged(monkeypatch):
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(6)]
    stack, x = ResidualStack(blocks, step=1.0, on_drift="raise", max_drift=1e-9), torch.randn(3, 6)
    with monkeypatch.context() as context:
        pretend_to_capture(context)
        half_square(stack(x)).backward()
        half_square(stack(x)).backward()
    assert stack.drift.maximum > 1e-9
    with pytest.raises(DriftError):
        half_square(stack(x)).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "options",
    [
        {"reverse": "paper"},
        {"reverse": "corrected"},
        {"reverse": "extrapolated"},
        {"reverse": "corrected", "anchors": 2, "keep_input": True},
        {"gradient": "checkpoint"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_captured_training_step_replays(scheme, options):
    """On other inputs and weights than it was captured with."""
    stack = ResidualStack(mlps(scheme, 6), scheme, **options).cuda()
    twin = ResidualStack([mlp() for _ in range(block_count(scheme, 6))], scheme, **options).cuda()
    x, optimizer = torch.randn(5, 6, device="cuda"), torch.optim.SGD(stack.parameters(), lr=0.1)

    def train():
        optimizer.zero_grad(set_to_none=False)
        half_square(stack(x)).backward()
        optimizer.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(beside)
    gc.collect()  # the first checkpoint is in a cycle, and holds gradient accumulators of the other stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for _ in range(3):
        x.copy_(torch.randn(5, 6))
        twin.load_state_dict(stack.state_dict())
        half_square(twin(x)).backward()
        expected = [parameter.grad.clone() for parameter in parameters_of(list(twin))]
        twin.zero_grad()
        graph.replay()
        got = [parameter.grad for parameter in parameters_of(list(stack))]
        assert relative_error(got, expected) < 1e-6
        if stack.drift is not None:
            torch.testing.assert_close(stack.drift.defects, twin.drift.defects, equal_nan=True)
