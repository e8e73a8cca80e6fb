"""Gradient errors of one trained network: stored increments, and states rounded to as many bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack, Reverse

from ...harness import trained
from ...harness.gradients import relative_error
from ...harness.trained import Network

NETWORKS: dict[str, tuple[Callable[[], Network], int]] = {
    "GPT": (trained.gpt, 300),
    "conv GN": (lambda: trained.conv(trained.group_norm), 150),
    "conv BN": (lambda: trained.conv(nn.BatchNorm2d), 150),
    "ConvNeXt": (trained.convnext, 150),
    "ViT": (trained.vit, 200),
    "h=1/64": (trained.deep_conv, 150),
}
"""How each is made, and for how many steps it trains."""
BITS = (1, 2, 3, 4, 6, 8)
KEEPING = ("none", "wild", "first 3")
WILD = 0.5
GROUP = 32
RIVALS = {"bf16": 16.0, "FP8 E4M3": 8.25, "int8": 8.25, "int4": 4.25}
"""What states are rounded to where no increments are stored, and the bits a value that takes. All but the first have
scales of their own for groups of 32."""


def errors(name: str, share: float, seed: int) -> dict[str, Any]:
    make, steps = NETWORKS[name]
    torch.manual_seed(seed)
    network = trained.train(make(), max(2, int(share * steps)))
    inputs, targets = network.draw()
    parameters = list(network.blocks.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        x = network.stem(inputs)
        for block in network.blocks:
            x = x + network.step * block(x)
        amp = torch.autograd.grad(network.loss(network.head(x).float(), targets), parameters)
    network.to(torch.float64)
    start = network.stem(inputs if inputs.dtype == torch.long else inputs.double()).detach()
    step = network.step
    stack = ResidualStack(list(network.blocks), step=step, on_drift="ignore", gradient="backprop")

    def gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(network.loss(network.head(stack(start)), targets), parameters)

    exact, states = gradients(), _states(network, start)
    sizes = [((b - a).norm() / a.norm()).item() for a, b in pairwise(states)]
    kept = {"none": (), "wild": tuple(n for n, size in enumerate(sizes) if size > WILD), "first 3": (0, 1, 2)}
    stack.gradient, stack.reverse = "adjoint", Reverse("step")
    found: dict[str, Any] = {
        "network": name,
        "sizes": sizes,
        "amp": relative_error(amp, exact),
        "rebuilt": relative_error(gradients(), exact),
        "stored": {},
    }
    for keeping in KEEPING:
        stack.anchors = kept[keeping]
        found["stored"][keeping] = {}
        for bits in BITS:
            stack.reverse = Reverse("stored", bits=bits)
            found["stored"][keeping][str(bits)] = relative_error(gradients(), exact)
    found["rivals"] = {
        rival: relative_error(_of_rounded_states(network, states, targets, rival), exact) for rival in RIVALS
    }
    return found


def _states(network: Network, x: Tensor) -> list[Tensor]:
    found = [x]
    with torch.no_grad():
        for block in network.blocks:
            found.append(found[-1] + network.step * block(found[-1]))
    return found


def _of_rounded_states(network: Network, states: Sequence[Tensor], targets: Tensor, rival: str) -> list[Tensor]:
    """Gradients of the blocks' parameters, each block's product taken at its rounded state."""
    last = states[-1].detach().requires_grad_()
    (g,) = torch.autograd.grad(network.loss(network.head(last), targets), last)
    found: list[Tensor] = []
    for block, state in zip(reversed(network.blocks), reversed(states[:-1]), strict=True):
        y = _rounded(state, rival).requires_grad_()
        parameters = list(block.parameters())
        through, *products = torch.autograd.grad(network.step * block(y), [y, *parameters], g)
        found = [*products, *found]
        g = g + through
    return found


def _rounded(x: Tensor, rival: str) -> Tensor:
    if rival == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    groups = x.reshape(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True).clamp_min(1e-30)
    if rival.startswith("FP8"):
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        return ((groups / scale).float().to(torch.float8_e4m3fn).to(x.dtype) * scale).view(x.shape)
    limit = 2 ** (int(rival.removeprefix("int")) - 1) - 1
    scale = largest / (limit + 0.499)
    return ((groups / scale).round().clamp(-limit, limit) * scale).view(x.shape)
