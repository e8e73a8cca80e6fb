"""`diagnose`: what it measures against what is known of simple networks, what it says, and how it is shown."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack, diagnose, smooth_init_
from resode_cuda.diagnosis.probe import Probe
from tests.support.networks import mlp, reference_blocks, reference_input

DIM = 6


class Linear(nn.Module):
    """x A^T"""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x):
        return x @ self.a.T


def linear_stack(count, rough=False, scale=1.0):
    """A(t) = A + t B, with noise at each place if it is rough."""
    generator = torch.Generator().manual_seed(1)
    a, b = (scale * torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    noise = [scale * torch.randn(2, 2, generator=generator, dtype=torch.float64) * rough for _ in places]
    return ResidualStack([Linear(a + t * b + e) for t, e in zip(places, noise, strict=True)])


def points(rows=5, dim=DIM):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_steepness_is_the_spectral_norm():
    stack = linear_stack(4)
    probe = Probe(stack, points(dim=2), (), {})
    for n, block in enumerate(stack):
        norm = torch.linalg.matrix_norm(block.a, 2).item() / 4
        assert probe.steepness(n) == pytest.approx(norm, rel=1e-2)
        assert probe.steepness(n) <= norm * (1 + 1e-6)


def test_steepness_of_a_network_with_kinks():
    block = nn.Sequential(nn.Linear(DIM, 12), nn.ReLU(), nn.Linear(12, DIM)).double()
    x = points()
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x), x).reshape(x.numel(), x.numel())
    probe = Probe(ResidualStack([block], step=1.0), x, (), {})
    assert probe.steepness(0) == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=2e-2)


@pytest.mark.parametrize("count", [8, 32, 128])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_bound_holds_and_is_near_on_linear_networks(count, scale):
    flow = diagnose(linear_stack(count, scale=scale), points(dim=2)).flow
    assert flow.farthest <= flow.bound <= 5 * flow.farthest
    assert flow.farthest <= flow.close_bound <= 1.5 * flow.farthest


def fitted_to(target, count):
    """The linear network x_N = B^T x_0, fitted to B by gradient descent from weights of 0."""
    blocks = [Linear(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(count)]
    stack, start = ResidualStack(blocks, gradient="backprop"), torch.eye(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(stack.parameters(), lr=count)
    for _ in range(200):
        loss = (stack(start) - target).square().mean()
        if loss < 1e-5:
            return stack, start
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"not fitted: {loss}")


@pytest.mark.parametrize("count", [25, 100])
def test_the_bounds_on_a_trained_linear_network(count):
    """The target turns by more than a right angle, which (e^L - 1) / 2L takes for growth."""
    stack, x = fitted_to(torch.tensor([[-0.87, -0.99], [0.72, 0.30]], dtype=torch.float64), count)
    flow = diagnose(stack, x).flow
    assert flow.farthest <= flow.close_bound <= 1.5 * flow.farthest
    assert flow.close_bound <= flow.bound <= 10 * flow.farthest


def test_the_flow_of_a_linear_network_is_the_matrix_exponential():
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=torch.float64)
    stack, x = ResidualStack([Linear(a) for _ in range(10)]), points(dim=2)
    flow = diagnose(stack, x).flow
    exact = x @ torch.linalg.matrix_exp(a).T
    network = x @ torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) + a / 10, 10).T
    assert flow.distances[-1] == pytest.approx(((network - exact).norm() / network.norm()).item(), rel=1e-6)


def test_the_bound_holds_on_smooth_networks_and_stays_for_rough_ones():
    bounds = {}
    for weights in ("smooth", "independent"):
        for count in (8, 16, 32, 64):
            flow = diagnose(ResidualStack(reference_blocks(count, weights)), reference_input()).flow
            assert flow.farthest <= flow.close_bound <= flow.bound
            bounds[weights, count] = flow.bound
    assert bounds["smooth", 64] < bounds["smooth", 8] / 6
    assert bounds["independent", 64] > bounds["independent", 8] / 2


def test_growth_is_the_spectral_norm_of_a_step():
    stack = linear_stack(4)
    probe = Probe(stack, points(dim=2), (), {})
    for n, block in enumerate(stack):
        norm = torch.linalg.matrix_norm(torch.eye(2) + block.a / 4, 2).item()
        assert probe.growth(n) == pytest.approx(norm, rel=1e-2)
        assert probe.growth(n) <= norm * (1 + 1e-6)


def test_a_smooth_network_is_rebuilt():
    torch.manual_seed(0)
    found = diagnose(smooth_init_(ResidualStack([mlp(DIM) for _ in range(16)])), points().float())
    assert found.suits_rebuilding
    assert found.verdict[0].startswith("It is close to its differential equation")
    assert found.verdict[1].startswith("Weights change by ")
    assert "Rebuilding converges at every step" in found.verdict[2]
    assert "likely to fail" not in found.verdict[3]
    assert found.verdict[4].startswith("Rebuild the states")
    errors = {(one.scheme, one.solver): one.error for one in found.reconstructions}
    assert errors["euler", "corrected"] < errors["euler", "paper"] / 10
    assert errors["heun", "paper"] < errors["euler", "paper"] / 10


def test_a_wild_step_is_named():
    torch.manual_seed(0)
    stack = ResidualStack([mlp(DIM) for _ in range(6)], step=1.0)
    with torch.no_grad():
        stack[2][2].weight.mul_(200)
    found = diagnose(stack, points().float(), tolerance=1e-3)
    assert "at step 2" in found.verdict[2]
    assert max(found.steps, key=lambda step: step.size).n == 2
    assert 2 in found.plan.chosen.anchors


def test_a_network_that_is_wild_throughout_is_not_rebuilt():
    torch.manual_seed(0)
    stack = ResidualStack([mlp(DIM) for _ in range(6)], step=8.0)
    found = diagnose(stack, points().float(), tolerance=3e-2)
    assert not found.suits_rebuilding
    assert found.verdict[0].startswith("It is far from")
    assert "training by it is likely to fail" in found.verdict[3]
    assert "The best that rebuilding gave" in found.verdict[5]


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_what_is_rebuilt_is_told_in_the_scheme_of_the_stack(scheme):
    torch.manual_seed(0)
    found = diagnose(smooth_init_(ResidualStack([mlp(DIM) for _ in range(9)], scheme)), points().float())
    errors = {one.solver: one.error for one in found.reconstructions if one.scheme == scheme}
    assert found.rebuilt == errors
    assert f"{errors['paper']:.1e} of its size" in found.verdict[3]


def trained(stack, amount, smooth):
    """The stack after a step by which its weights move by this amount, alike along depth or each on its own."""
    generator = torch.Generator().manual_seed(3)
    blocks, common = list(stack), {}
    with torch.no_grad():
        for place, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                common.setdefault(name, drawn)
                parameter.add_(common[name] * place / len(blocks) if smooth else drawn, alpha=amount)
    return stack


def test_smoothness_over_training():
    torch.manual_seed(0)
    stack, x = smooth_init_(ResidualStack([mlp(DIM) for _ in range(12)])), points().float()
    at_first = diagnose(stack, x)
    later = diagnose(trained(stack, 0.2, smooth=True), x, earlier=[at_first])
    assert later.smoothness[0] == at_first.smoothness[0]
    assert later.verdict[1].endswith("training has kept them smooth in depth.")
    assert "earlier 1" in str(later)
    rough = diagnose(trained(stack, 1.0, smooth=False), x, earlier=[at_first.to_dict(), later])
    assert len(rough.smoothness) == 3
    assert "training has made them rough in depth; smooth_gradients_" in rough.verdict[1]
    assert rough.smoothness[-1].change > 5 * rough.smoothness[0].change
    left = diagnose(trained(stack, 0.1, smooth=False), x, earlier=[rough])
    assert left.verdict[1].endswith("they started rough in depth, and training leaves them so.")
    with pytest.raises(ValueError, match="earlier must hold diagnoses"):
        diagnose(stack, x, earlier=[{"steps": []}])


def test_smoothness_of_weights_that_are_tied_or_independent():
    block = mlp(DIM)
    tied = diagnose(ResidualStack([block] * 5), points().float())
    assert not tied.smoothness[0].roughness
    assert tied.smoothness[0].change == 0
    independent = diagnose(ResidualStack([mlp(DIM) for _ in range(16)]), points().float())
    assert independent.smoothness[0].change > 0.5
    assert independent.verdict[1].endswith("they are rough in depth.")


def test_units_that_switch_sides():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(DIM, 40), nn.ReLU(), nn.Linear(40, DIM)) for _ in range(3)]
    coarse, fine = (
        diagnose(ResidualStack(copy.deepcopy(blocks), step=step), points().float()).steps for step in (1.0, 1e-4)
    )
    assert all(0 < step.switched < 0.5 for step in coarse)
    assert all(step.switched < 1e-2 for step in fine)
    smooth = diagnose(ResidualStack([mlp(DIM) for _ in range(3)]), points().float()).steps
    assert all(step.switched == 0 for step in smooth)


def test_blocks_that_differ_have_no_flow():
    stack = ResidualStack([mlp(DIM, 8), mlp(DIM, 12)])
    found = diagnose(stack, points().float())
    assert found.flow is None
    assert "same shapes" in found.no_flow
    assert "was not solved" in found.verdict[0]


@pytest.mark.parametrize("form", ["residual", "block"])
def test_arguments_modes_and_forms(form):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.1), nn.Tanh())

        def forward(self, x, scale, *, shift):
            moved = self.body(x) * scale + shift
            return x + moved if form == "block" else moved

    stack = ResidualStack([Conditioned() for _ in range(3)], form=form)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    state = torch.get_rng_state()
    found = diagnose(stack, points().float(), torch.tensor(0.3), shift=0.01)
    assert len(found.steps) == 3
    assert torch.equal(state, torch.get_rng_state())
    for name, value in stack.state_dict().items():
        assert torch.equal(value, before[name])
    assert {one.scheme for one in found.reconstructions} == ({"euler", "heun"} if form == "residual" else {"euler"})


def test_it_is_shown_as_text_as_values_and_as_a_picture(tmp_path):
    found = diagnose(ResidualStack([mlp(DIM) for _ in range(30)]), points().float())
    shown = str(found)
    assert "and 6 steps that move the state less" in shown
    assert all(sentence in shown for sentence in found.verdict)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["steps"][3]["steepness"] == found.steps[3].steepness
    assert values["plan"]["tolerance"] == 1e-2
    assert all(math.isfinite(value) for value in values["smoothness"][-1]["roughness"].values())
    found.figure().savefig(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"use to_blocks\(\)"):
        diagnose(ResidualMLP(4, 4, 2), torch.randn(2, 4))


def test_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom resode_cuda import ResidualStack\n"
        "def made():\n    torch.manual_seed(0)\n"
        "    return ResidualStack([nn.Linear(4, 4) for _ in range(5)]), torch.randn(3, 4)\n"
        "def wrong():\n    return 3\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "resode_cuda", "diagnose", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("mine:made", "--tolerance", "amp", "--json", "found.json", "--figure", "found.png")
    assert done.returncode == 0, done.stderr
    assert "It is " in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["verdict"][0] in done.stdout
    assert (tmp_path / "found.png").exists()
    done = run("mine:made", "--earlier", "found.json")
    assert "where it was" in done.stdout
    done = run("mine:made", "--earlier", "mine.py")
    assert "files that --json wrote" in done.stderr
    assert "Traceback" not in done.stderr
    for factory, told in (("mine:wrong", "got int"), ("mine:none", "imported"), ("mine", "module:function")):
        done = run(factory)
        assert done.returncode == 1
        assert told in done.stderr
        assert "Traceback" not in done.stderr
