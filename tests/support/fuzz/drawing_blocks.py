"""Blocks of random networks that draw random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.fuzz.blocks import DIM, ROWS, FuzzBlock


class Attention(FuzzBlock):
    def made(self):
        return nn.MultiheadAttention(DIM, 2, dropout=0.3, batch_first=True)

    def increment(self, x):
        tokens = x.reshape(ROWS, -1, DIM)
        return self.body(tokens, tokens, tokens, need_weights=False)[0].reshape(x.shape)


class Dropped(FuzzBlock):
    def made(self):
        return nn.Sequential(super().made(), nn.Dropout(0.4))


class FunctionallyDropped(FuzzBlock):
    def increment(self, x):
        return F.dropout(self.body(x), 0.4, self.training)


class Noisy(FuzzBlock):
    """Draws in eval mode too, by several functions."""

    def increment(self, x):
        order = torch.randperm(DIM)
        return self.body(x + 0.1 * torch.randn_like(x))[..., order] * torch.rand(DIM, dtype=x.dtype)


class SelfSeeded(FuzzBlock):
    """Draws from a state that it puts back, so that the generator is as it was."""

    def increment(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return F.dropout(self.body(x), 0.4)


class Forked(FuzzBlock):
    """Draws from the program's generator and puts its state back: to look at the state afterwards shows nothing."""

    def increment(self, x):
        with torch.random.fork_rng(devices=[]):
            return F.dropout(self.body(x), 0.4)


class DrawingInPython(FuzzBlock):
    def increment(self, x):
        return self.body(x) * random.random()


class DrawingInNumpy(FuzzBlock):
    def increment(self, x):
        return self.body(x) * np.random.rand()


class DrawingFromItsOwn(FuzzBlock):
    """Draws from a generator of its own."""

    def made(self):
        self.generator = torch.Generator().manual_seed(3)
        return super().made()

    def increment(self, x):
        return self.body(x) * torch.rand(DIM, dtype=x.dtype, generator=self.generator)


DRAWING_BLOCKS = {
    "attention": Attention,
    "dropout": Dropped,
    "functional_dropout": FunctionallyDropped,
    "noise": Noisy,
    "self_seeded": SelfSeeded,
    "forked_rng": Forked,
    "python_random": DrawingInPython,
    "numpy_random": DrawingInNumpy,
    "own_generator": DrawingFromItsOwn,
}
