"""calibrate: the plan meets its tolerance, costs what it says, and measuring it leaves no trace."""

import math

import pytest
import torch
from torch import nn

from resode_cuda import Candidate, Plan, ResidualMLP, ResidualStack, Reverse, calibrate
from resode_cuda.candidates import SOLVERS, STORED
from resode_cuda.method import anchored_steps
from tests.support.exact import errors_of
from tests.support.networks import (
    block_count,
    gradient_error,
    half_square,
    mlps,
    parameters_of,
    reference_blocks,
    reference_input,
)


class ConvNorm(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
        )
        with torch.no_grad():
            self.body[-1].weight.mul_(scale)

    def forward(self, x):
        return self.body(x)


class Attention(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        with torch.no_grad():
            self.out.weight.mul_(scale)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def network(seed):
    """One of many random networks, and a function that draws batches for it."""
    torch.manual_seed(seed)
    pick = torch.Generator().manual_seed(1000 + seed)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=pick))]

    kind, scheme, steps = (
        one_of("mlp", "conv", "attention"),
        one_of("euler", "heun"),
        64 if seed % 10 == 0 else one_of(4, 9, 16),
    )
    scale, h, tied = one_of(0.3, 1.0, 2.0, 4.0), one_of(None, 1.0), one_of(True, False)
    make = {"mlp": lambda: mlps("euler", 1, scale=scale)[0], "conv": lambda: ConvNorm(scale)}.get(
        kind, lambda: Attention(scale)
    )
    blocks = [make() for _ in range(block_count(scheme, steps))]
    if tied:
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
    shape = {"mlp": (16, 6), "conv": (8, 3, 5, 5), "attention": (4, 7, 6)}[kind]
    return ResidualStack(blocks, scheme, step=h, on_drift="ignore"), lambda: torch.randn(shape)


@pytest.mark.usefixtures("float64")
def test_a_plan_meets_its_tolerance_on_its_batch_always_and_on_a_fresh_one_nearly():
    outcomes = []
    for seed in range(40):
        stack, batch = network(seed)
        if seed % 2:
            optimizer = torch.optim.Adam(stack.parameters(), 1e-2)
            stack.gradient = "backprop"
            for _ in range(5):
                optimizer.zero_grad()
                stack(batch()).square().mean().backward()
                optimizer.step()
        x = batch()
        tightest = calibrate(stack, x, tolerance=1e-3)
        for tolerance in (1e-1, 1e-2, 1e-3):
            plan = tightest.within(tolerance)
            stack.apply_plan(plan)
            assert errors_of(stack, x) <= tolerance
            assert plan.chosen.error <= tolerance
            assert all(candidate.error > tolerance for candidate in plan.candidates[:-1])
            outcomes.append(errors_of(stack, batch()) <= 3 * tolerance)
    assert sum(outcomes) / len(outcomes) >= 0.95


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.usefixtures("float64")
def test_the_errors_are_those_of_the_solvers(scheme):
    blocks, x = reference_blocks(block_count(scheme, 16), "independent"), reference_input()
    plan = calibrate(ResidualStack(blocks, scheme), x, tolerance=1e-7)
    for candidate in plan.candidates[:6]:
        assert candidate.error == pytest.approx(gradient_error(blocks, scheme, x, reverse=candidate.reverse), rel=1e-6)
    assert plan.chosen.error <= 1e-7


def test_checkpointing_is_the_last_resort_and_said_to_be():
    stack = ResidualStack([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], step=1.0, on_drift="ignore")
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(20)
    plan = calibrate(stack, torch.randn(5, 6), tolerance=1e-9)
    assert plan.is_last_resort
    assert plan.chosen.gradient == "checkpoint"
    assert plan.chosen.error == 0
    tried = {anchored_steps(candidate.anchors, 4) for candidate in plan.candidates[:-1]}
    assert {(), (0,), (0, 2)} <= tried
    assert {candidate.reverse for candidate in plan.candidates[:-1] if candidate.anchors is None} >= {
        SOLVERS[0],
        SOLVERS[1],
        STORED[0],
    }
    assert "last resort" in str(plan)
    stack.apply_plan(plan)
    assert stack.gradient == "checkpoint"
    assert stack.drift is None


class Routed(nn.Module):
    """Each row goes to the expert with the highest score, and no other."""

    def __init__(self):
        super().__init__()
        self.scores, self.experts = nn.Linear(6, 4), nn.ModuleList(mlps("euler", 4, scale=2.0))

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts])
        return outputs[self.scores(x).argmax(1), torch.arange(len(x))]


def test_blocks_that_are_not_continuous_are_checkpointed():
    torch.manual_seed(2)
    stack = ResidualStack([Routed() for _ in range(12)], step=1.0, on_drift="ignore")
    plan = calibrate(stack, torch.randn(64, 6), tolerance=1e-3)
    assert plan.is_last_resort
    assert plan.chosen.gradient == "checkpoint"


def test_candidates_go_from_the_cheapest_to_the_dearest():
    assert SOLVERS[0] == Reverse("extrapolate")
    costs = [solver.evaluations for solver in SOLVERS]
    assert costs == sorted(costs)
    assert len(set(SOLVERS)) == 16


def test_a_residual_mlp_is_no_stack_even_with_children():
    class Measured(ResidualMLP):
        def __init__(self):
            super().__init__(6, 10, 3)
            self.metric = nn.Identity()

    with pytest.raises(TypeError, match=r"^calibrate: stack must be a ResidualStack, got Measured"):
        calibrate(Measured(), torch.randn(2, 6))


class Noisy(nn.Module):
    """Everything that a training step could leave a trace in: batch norm, dropout, a frozen layer, a flag."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 6))
        self.body[0].bias.requires_grad_(False)
        self.body[2].eval()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_training_is_as_before(fails):
    stack = ResidualStack([Noisy() for _ in range(5)], reverse="paper", anchors=3)
    x = torch.randn(7, 6, requires_grad=True)
    half_square(stack(x)).backward()

    def loss(out):
        if fails:
            raise ZeroDivisionError
        return out.sum()

    def everything():
        return [
            [tensor.clone() for tensor in stack.state_dict().values()],
            [None if p.grad is None else p.grad.clone() for p in (x, *stack.parameters())],
            [torch.get_rng_state()],
            [module.training for module in stack.modules()],
            [p.requires_grad for p in stack.parameters()],
            [stack.gradient, stack.reverse, stack.anchors, stack._monitor],
        ]

    before, tensors = everything(), list(stack.state_dict(keep_vars=True).values())
    if fails:
        with pytest.raises(ZeroDivisionError):
            calibrate(stack, x, loss=loss)
    else:
        calibrate(stack, x, tolerance=1e-4, loss=loss)
    for got, expected in zip(everything(), before, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b
    assert all(a is b for a, b in zip(stack.state_dict(keep_vars=True).values(), tensors, strict=True))


def test_arguments_and_loss_are_the_users():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale, *, shift):
            return torch.tanh(self.linear(x)) * scale + shift

    stack, x = ResidualStack([Scaled() for _ in range(6)]), torch.randn(3, 4)
    seen = []
    calibrate(stack, x, torch.ones(4), shift=torch.zeros(4), loss=lambda out: seen.append(out.shape) or out.sum())
    assert set(seen) == {x.shape}


def test_without_parameters_the_inputs_gradient_is_compared():
    stack = ResidualStack([nn.Tanh() for _ in range(8)])
    plan = calibrate(stack, torch.randn(3, 4), tolerance=1e-3)
    assert 0 < plan.chosen.error <= 1e-3


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_evaluations_and_held_memory_are_those_of_a_training_step(scheme):
    steps, x = 9, torch.randn(16, 6)
    plan = calibrate(ResidualStack(mlps(scheme, steps), scheme), x, tolerance=1e-30)
    blocks_per_step, state = (2 if scheme == "heun" else 1), 16 * 6 * 4
    for candidate in plan.candidates:
        if candidate.anchors is None and candidate.reverse is not None and candidate.reverse.predictor == "step":
            assert candidate.evaluations == blocks_per_step * steps * (1 + candidate.reverse.evaluations)
            assert candidate.held_bytes == state
    by_name = {str(candidate): candidate for candidate in plan.candidates}
    assert by_name["extrapolate"].held_bytes == 3 * state
    assert by_name["step, anchors 3"].held_bytes == 3 * state  # x_N and two anchors; the first is the input
    assert by_name["checkpoint"].evaluations == 2 * blocks_per_step * steps
    assert all(candidate.seconds > 0 for candidate in plan.candidates)


def test_candidates_that_diverge_are_infinitely_far_off_and_kept(tmp_path):
    torch.manual_seed(0)
    stack = ResidualStack([nn.Linear(4, 4) for _ in range(40)], step=1.0, on_drift="raise")
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(8)
    plan = calibrate(stack, torch.randn(3, 4), loss=lambda out: out.sum() * 1e-30)
    assert math.inf in [candidate.error for candidate in plan.candidates]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_bad_input_is_refused():
    stack, x = ResidualStack(mlps("euler", 4)), torch.randn(3, 6)
    with pytest.raises(ValueError, match="calibrate: tolerance must be positive and finite, got 0"):
        calibrate(stack, x, tolerance=0)
    with pytest.raises(ValueError, match="exact gradient must be finite and not zero"):
        calibrate(stack, x, loss=lambda out: out.sum() * 0)
    with pytest.raises(ValueError, match=r"tolerance must be >= 0\.01, which was measured"):
        calibrate(stack, x).within(1e-3)
    with pytest.raises(ValueError, match="recalibrate_every needs steps >= 1, got -1"):
        stack.recalibrate_every(-1)
    with pytest.raises(ValueError, match=r"needs a share in \(0, 1\], got 2"):
        stack.recalibrate_every(5, share=2)
    with pytest.raises(ValueError, match="recalibrate_every: tolerance must be positive and finite, got -1"):
        stack.recalibrate_every(5, -1)


@pytest.mark.filterwarnings("ignore:ResidualStack. block . changed its increment")  # weights doubled, errors built up
@pytest.mark.parametrize("weights", ["smooth", "independent"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
@pytest.mark.usefixtures("float64")
def test_defects_estimate_the_gradients_error(weights, scale, scheme, reverse):
    for steps in (16, 64, 256):
        blocks = reference_blocks(block_count(scheme, steps), weights)
        with torch.no_grad():
            for parameter in parameters_of(blocks):
                parameter.mul_(scale)
        stack, x = ResidualStack(blocks, scheme, reverse=reverse, on_drift="ignore"), reference_input()
        half_square(stack(x)).backward()
        measured = Candidate(
            gradient="adjoint",
            reverse=stack.reverse,
            anchors=None,
            evaluations=0,
            seconds=0.0,
            held_bytes=0,
            defect=stack.drift.defects.square().mean().sqrt().item(),
            error=errors_of(stack, x),
        )
        fresh = torch.randn(8, 16)
        truth = errors_of(stack, fresh)
        stack.apply_plan(Plan(1.0, (measured,)))
        half_square(stack(fresh)).backward()
        assert truth / 5 < stack.drift.gradient_error.item() < 5 * truth


def test_the_loss_is_called_once_and_leaves_its_modules_as_they_were():
    head, calls = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3), nn.ReLU(inplace=True)), []

    def loss(out):
        calls.append(out)
        return head(out).sum()

    calibrate(ResidualStack(mlps("euler", 8)), torch.randn(4, 6), tolerance=1e-8, loss=loss)
    assert len(calls) == 1
    assert head[0].num_batches_tracked == 0
    assert (head[0].running_mean == 0).all()


def test_a_loss_may_overwrite_the_output():
    stack, x = ResidualStack(mlps("euler", 8)), torch.randn(4, 6)
    in_place = calibrate(stack, x, loss=lambda out: out.clone().mul_(2).sum())
    assert in_place.candidates[0].error == calibrate(stack, x, loss=lambda out: (2 * out).sum()).candidates[0].error


@pytest.mark.parametrize(
    ("stack", "loss", "error", "message"),
    [
        (nn.Linear(6, 6), None, TypeError, "stack must be a ResidualStack, got Linear"),
        (None, lambda out: out, TypeError, "loss must return a scalar tensor"),
        (None, lambda out: out.detach().sum(), TypeError, "loss must return a scalar tensor"),
        (None, lambda out: 1.0, TypeError, "loss must return a scalar tensor"),
    ],
)
def test_what_calibrate_cannot_use_is_named(stack, loss, error, message):
    with pytest.raises(error, match=f"calibrate: {message}"):
        calibrate(stack or ResidualStack(mlps("euler", 3)), torch.randn(3, 6), loss=loss)
