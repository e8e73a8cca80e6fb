"""The peak of a step whose blocks' graphs are kept."""

import copy

import pytest
import torch
from torch import nn

from tests.support.memory import peak
from tests.support.networks import mlp
from tests.support.stored_networks import DIM, SCHEMES, ordinary


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_peak_grows_by_what_is_stored_alone(scheme):
    def of_depth(steps):
        blocks = [mlp(DIM, DIM) for _ in range(steps + (scheme == "heun"))]
        return peak(ordinary(blocks, scheme, reverse="stored"), torch.randn(256, DIM)) / (256 * DIM * 4)

    # 8.25 bits a value of 32, groups of 32 in rows of 40 values: 0.41 of a state for each step more.
    assert (of_depth(40) - of_depth(8)) / 32 < 0.7


def test_what_a_gradient_was_taken_of_is_let_go_of_at_once():
    """As by torch's checkpointing: else all that a block saves is held until the last of its gradients."""

    def wide():
        layers = [layer for n in range(6) for layer in (nn.Linear(DIM, 8 * DIM), nn.Tanh(), nn.Linear(8 * DIM, DIM))]
        return nn.Sequential(*layers)

    blocks, x = [wide() for _ in range(4)], torch.randn(512, DIM)
    peaks = {}
    for way in ("stored", "checkpoint"):
        stack = ordinary(copy.deepcopy(blocks), "euler", reverse="stored")
        stack.gradient = "adjoint" if way == "stored" else "checkpoint"
        peaks[way] = peak(stack, x)
    assert peaks["stored"] < 1.1 * peaks["checkpoint"]
