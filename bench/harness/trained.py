"""Networks trained for seconds, most of ordinary form (h = 1): accuracy is judged on them, since fresh weights flatter.

Small ones of the kinds that people have: a language model on the source code of Python's standard library, and
convolutional and attention networks on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 3e-3
CHARACTERS = 128
CLASSES = 10

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Network:
    """A stem, blocks that return increments, and a head, with a way to draw batches."""

    stem: nn.Module
    blocks: nn.ModuleList
    head: nn.Module
    draw: Callable[[], Batch]
    """A batch to train on, drawn from torch's global generator."""
    draw_held_out: Callable[[], Batch]
    """One that is not trained on, where a share of the data is held out."""
    loss: Loss
    step: float = 1.0
    """h."""

    @property
    def modules(self) -> list[nn.Module]:
        return [self.stem, self.blocks, self.head]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    def to(self, dtype: torch.dtype) -> Network:
        for module in self.modules:
            module.to(dtype)
        return self


class Attention(nn.Module):
    """Pre-norm self-attention without the addition."""

    def __init__(self, dim: int, heads: int = 4, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(attended.transpose(1, 2).reshape(x.shape))


def feed_forward(dim: int, factor: int = 4) -> nn.Module:
    """Pre-norm, without the addition."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, factor * dim), nn.GELU(), nn.Linear(factor * dim, dim))


def gpt(layers: int = 6, dim: int = 96, length: int = 64, rows: int = 16, held_out: float = 0.0) -> Network:
    """A language model of characters; each layer is two steps."""
    parts = _split_off(_source_code(), held_out)
    embed, head = nn.Embedding(CHARACTERS, dim), nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CHARACTERS))
    blocks = nn.ModuleList(block for _ in range(layers) for block in (Attention(dim), feed_forward(dim)))
    for module in (*embed.modules(), *blocks.modules(), *head.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def drawn(text: Tensor) -> Callable[[], Batch]:
        def draw() -> Batch:
            starts = torch.randint(0, len(text) - length - 1, (rows,))
            windows = torch.stack([text[i : i + length + 1] for i in starts])
            return windows[:, :-1], windows[:, 1:]

        return draw

    draw, draw_held_out = map(drawn, parts)
    return Network(embed, blocks, head, draw, draw_held_out, _cross_entropy_of_characters)


def _split_off(data: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """What is trained on, and the share at the end that is held out; without one all of it twice."""
    count = int(held_out * len(data))
    return (data[:-count], data[-count:]) if count else (data, data)


def _cross_entropy_of_characters(out: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), targets.flatten())


def conv(
    norm: Callable[[int], nn.Module], blocks: int = 16, channels: int = 16, rows: int = 64, held_out: float = 0.0
) -> Network:
    """Convolution - norm - ReLU - convolution."""

    def block() -> nn.Module:
        up, down = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        return nn.Sequential(up, norm(channels), nn.ReLU(), down)

    return _of_digits(nn.ModuleList(block() for _ in range(blocks)), channels, rows, held_out)


def deep_conv(blocks: int = 64) -> Network:
    """The same with group norm as the discretised ODE of the paper, h = 1/N."""
    return replace(conv(group_norm, blocks), step=1 / blocks)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution - LayerNorm - pointwise up - GELU - pointwise down, without the addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = self.norm(self.depthwise(x).movedim(1, -1))
        return self.down(F.gelu(self.up(channels_last))).movedim(-1, 1)


def convnext(blocks: int = 12, channels: int = 16, rows: int = 64) -> Network:
    return _of_digits(nn.ModuleList(ConvNeXtBlock(channels) for _ in range(blocks)), channels, rows)


def vit(layers: int = 4, dim: int = 48, rows: int = 64, held_out: float = 0.0) -> Network:
    """2x2 patches of the digits; each layer is two steps."""
    blocks = (block for _ in range(layers) for block in (Attention(dim, is_causal=False), feed_forward(dim)))
    head = nn.Sequential(nn.LayerNorm(dim), _MeanOfPatches(), nn.Linear(dim, CLASSES))
    draw, draw_held_out = (_drawn(*part, rows) for part in _digits(held_out))
    return Network(_Patches(dim), nn.ModuleList(blocks), head, draw, draw_held_out, F.cross_entropy)


class _Patches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.position = nn.Conv2d(1, dim, 2, stride=2), nn.Parameter(0.02 * torch.randn(16, dim))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.project(images).flatten(2).transpose(1, 2) + self.position
        return found


class _MeanOfPatches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def train(network: Network, steps: int) -> Network:
    """With AdamW, one cycle of the learning rate, and gradients clipped to a norm of 1; exactly."""
    optimizer = torch.optim.AdamW(network.parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        inputs, targets = network.draw()
        x = network.stem(inputs)
        for block in network.blocks:
            x = x + network.step * block(x)
        optimizer.zero_grad()
        network.loss(network.head(x), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters, 1.0)
        optimizer.step()
        schedule.step()
    return network


def _of_digits(blocks: nn.ModuleList, channels: int, rows: int, held_out: float = 0.0) -> Network:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, CLASSES))
    stem = nn.Conv2d(1, channels, 3, padding=1)
    draw, draw_held_out = (_drawn(*part, rows) for part in _digits(held_out))
    return Network(stem, blocks, head, draw, draw_held_out, F.cross_entropy)


def _drawn(images: Tensor, labels: Tensor, rows: int) -> Callable[[], Batch]:
    def draw() -> Batch:
        chosen = torch.randint(0, len(labels), (rows,))
        return images[chosen], labels[chosen]

    return draw


def _digits(held_out: float) -> list[Batch]:
    """What is trained on, and what is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    return list(zip(_split_off(images, held_out), _split_off(labels, held_out), strict=True))


def _source_code(files: int = 60) -> Tensor:
    """Characters of the first modules of Python's standard library, by name."""
    paths: Iterable[Path] = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    return torch.tensor([min(ord(c), CHARACTERS - 1) for path in paths for c in path.read_text(errors="ignore")])
