"""Networks, the plain loop over them, and comparisons, which the tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack
from resode_cuda.schemes import Stages, StepVjp, add

DIM, HIDDEN, ROWS = 16, 32, 8


class TanhBlock(nn.Module):
    """tanh(x W1) W2, the block of the reference figures."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1) @ self.w2


def reference_blocks(count: int, weights: str) -> list[nn.Module]:
    """The networks of the reference figures, `count` blocks: weights "smooth" in depth, "independent", or "rough"
    (A + B and A - B in turn)."""
    generator = torch.Generator().manual_seed(0)
    depth = torch.linspace(0, 1, count, dtype=torch.float64)

    def noise(shape: tuple[int, int]) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])

    def layers(shape: tuple[int, int]) -> list[Tensor]:
        if weights == "independent":
            return [1.7 * noise(shape) for _ in range(count)]
        a, b = noise(shape), noise(shape)
        if weights == "rough":
            return [a + (-1) ** n * b for n in range(count)]
        c = noise(shape)
        return [a + torch.sin(2 * t) * b + torch.cos(3 * t) * c for t in depth]

    return [TanhBlock(*pair) for pair in zip(layers((DIM, HIDDEN)), layers((HIDDEN, DIM)), strict=True)]


def reference_input() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)


def mlp(dim: int = 6, hidden: int = 10, scale: float = 1.0) -> nn.Module:
    block = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(scale)
    return block


def mlps(scheme: str, steps: int, **options: float) -> list[nn.Module]:
    return [mlp(**options) for _ in range(block_count(scheme, steps))]


def block_count(scheme: str, steps: int) -> int:
    return steps + (scheme == "heun")


def plain(blocks: Sequence[nn.Module], scheme: str, x: Tensor, *args, h=None, **kwargs) -> Tensor:
    """The ordinary network, by torch's own additions, which round product and sum once."""
    steps = len(blocks) - (scheme == "heun")
    h = 1 / steps if h is None else h
    for n in range(steps):
        h_n = h[n] if isinstance(h, Sequence) else h
        if scheme == "euler":
            x = x.add(blocks[n](x, *args, **kwargs), alpha=h_n)
        else:
            k1 = blocks[n](x, *args, **kwargs)
            k2 = blocks[n + 1](x.add(k1, alpha=h_n), *args, **kwargs)
            x = x.add(k1 + k2, alpha=h_n / 2)
    return x


def half_square(x: Tensor) -> Tensor:
    return x.double().square().sum() / 2


def parameters_of(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for p in nn.ModuleList(blocks).parameters() if p.requires_grad]


def gradients(run: Callable[..., Tensor], inputs: Sequence[Tensor], loss: Callable[[Tensor], Tensor] = half_square):
    return torch.autograd.grad(loss(run()), inputs)


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|got - exact| / |exact| over all tensors together."""
    assert len(got) == len(exact)
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(got, exact, strict=True))
    return math.sqrt(difference / sum(b.double().square().sum() for b in exact))


def gradient_error(blocks: Sequence[nn.Module], scheme: str, x: Tensor, **options) -> float:
    """Relative error of the stack's parameter gradients against autograd through the ordinary network."""
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    return relative_error(gradients(lambda: ResidualStack(blocks, scheme, **options)(x), parameters), exact)


def fitted_slope(depths: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: the slope of -log(error) over log(depth), by least squares."""
    u = torch.tensor(depths, dtype=torch.float64).log()
    v = torch.tensor(errors, dtype=torch.float64).log()
    u, v = u - u.mean(), v - v.mean()
    return -(u @ v / (u @ u)).item()


def pretend_to_capture(monkeypatch) -> None:
    """Tell the library that a CUDA graph is being captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def pretend_to_have_a_gpu(monkeypatch, capability=(9, 0), processors=132):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    facts = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


class Midpoint:
    """A third scheme, written as CONTRIBUTING says: x_{n+1} = x_n + h k2, k2 = f_{n+1}(x_n + (h/2) f_n(x_n))."""

    name: ClassVar[str] = "midpoint"
    blocks_per_step: ClassVar[int] = 2
    sample_point: ClassVar[float] = 0.5
    has_state_inside = False

    @staticmethod
    def weight(h):
        return h

    @staticmethod
    def stages(blocks, x, h):
        f, f_next = blocks
        return Stages(f_next(add(x, f(x), 0.5 * h)))

    @staticmethod
    def add(x, stages, h):
        return add(x, stages.k1, h)

    @staticmethod
    def reverse_step(blocks, x_next, h):
        f, f_next = blocks
        return add(x_next, f(add(x_next, f_next(x_next), -0.5 * h)), -h)

    @staticmethod
    def vjp(blocks, x, h, gamma, linearize):
        f, f_next = blocks
        k1, vjp = linearize(f, x)
        k2, vjp_next = linearize(f_next, add(x, k1, 0.5 * h))
        through = vjp_next(gamma)
        return StepVjp(Stages(k2), through, vjp(0.5 * h * through))


def normed(dim=DIM, hidden=HIDDEN):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))


def initialised(count, build=normed):
    """Blocks with PyTorch's default initialisation; the first and the last are the same at every count."""
    torch.manual_seed(0)
    blocks = [build() for _ in range(count)]
    return [blocks[0], *blocks[2:], *blocks[1:2]]


def weights(stack, name):
    return torch.stack([block.get_parameter(name).detach() for block in stack])
