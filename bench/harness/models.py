"""The networks of the benchmark, with random data of the right shape where the values do not matter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cuda import ResidualStack

from .workload import Workload

CLASSES = 10
SIDE = 8  # pixels of a digit's image


def block_count(scheme: str, steps: int) -> int:
    """Heun's last step uses one block more."""
    return steps + (scheme == "heun")


def digits_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels, which steadies so short a training."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


class DigitsNet(nn.Sequential):
    """Images [rows, 1, 8, 8] to 10 logits: a convolution up, the residual stack, a head.

    Tied blocks start from the same weights, the initialisation smooth in depth that the reverse solvers are made for;
    training is free to take them apart. Step None is 1/N.
    """

    def __init__(self, scheme: str, steps: int, channels: int, tied: bool = True, step: float | None = None) -> None:
        block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(2, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        blocks = [copy.deepcopy(block) for _ in range(block_count(scheme, steps))]
        if not tied:
            for module in (module for block in blocks for module in block):
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
        # Solvers are compared with how they drift, and need not be warned about.
        stack = ResidualStack(blocks, scheme, step=step, on_drift="ignore")
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            stack,
            nn.GroupNorm(2, channels),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (SIDE // 2) ** 2, CLASSES),
        )
        self.stack = [stack]  # in a list: registered once already

    def workload(self, images: Tensor, labels: Tensor) -> Workload:
        return Workload(self, self.stack[0], [(images, labels)], digits_loss)


def digits_workload(scheme: str, steps: int, channels: int, rows: int, device: str) -> Workload:
    """The digits net on random images."""
    net = DigitsNet(scheme, steps, channels).to(device)
    return net.workload(torch.rand(rows, 1, SIDE, SIDE, device=device), torch.arange(rows, device=device) % CLASSES)


def mlp_workload(scheme: str, steps: int, dim: int, hidden: int, rows: int, device: str, batches: int = 1) -> Workload:
    """Blocks Linear-Tanh-Linear, independent in depth, fp32."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    stack = ResidualStack([block() for _ in range(block_count(scheme, steps))], scheme, on_drift="ignore").to(device)
    return _regression(stack, dim, rows, batches)


def smooth_mlp_workload(
    scheme: str, steps: int, dim: int, hidden: int, rows: int, device: str, dtype: torch.dtype, seed: int
) -> Workload:
    """Blocks Linear-Tanh-Linear whose weights are samples of one smooth function of depth, whatever the depth."""
    generator = torch.Generator().manual_seed(seed)
    curves = [
        (weight_curve((hidden, dim), generator), weight_curve((dim, hidden), generator)),
        (weight_curve((hidden,), generator), weight_curve((dim,), generator)),
    ]
    count = block_count(scheme, steps)
    blocks = []
    for n in range(count):
        first, last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        with torch.no_grad():
            for linear, weight, bias in zip((first, last), *curves, strict=True):
                linear.weight.copy_(weight(n / steps))
                linear.bias.copy_(bias(n / steps))
        blocks.append(nn.Sequential(first, nn.Tanh(), last).to(device, dtype))
    torch.manual_seed(seed)  # the same data at every depth
    return _regression(ResidualStack(blocks, scheme, on_drift="ignore"), dim, rows)


def weight_curve(shape: tuple[int, ...], generator: torch.Generator) -> Callable[[float], Tensor]:
    """A random smooth function of the depth t in [0, 1], A + B sin(2t) + C cos(3t), scaled by the fan-in."""
    a, b, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1]) for _ in range(3))
    return lambda t: a + math.sin(2 * t) * b + math.cos(3 * t) * c


def _regression(stack: ResidualStack, dim: int, rows: int, batches: int = 1) -> Workload:
    weight = next(stack.parameters())

    def sample() -> Tensor:
        return torch.randn(rows, dim, dtype=torch.float64).to(weight.device, weight.dtype)

    return Workload(stack, stack, [(sample(), sample()) for _ in range(batches)], half_square)
