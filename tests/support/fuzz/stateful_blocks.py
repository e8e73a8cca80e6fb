"""Blocks of random networks whose outputs depend on state of their own, or on what no library can see."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.fuzz.blocks import DIM, HIDDEN, ROWS, FuzzBlock


class Counting(FuzzBlock):
    """Changes a buffer, then depends on it."""

    def made(self):
        self.register_buffer("calls", self.initial())
        return super().made()

    def initial(self):
        return torch.zeros((), dtype=torch.float64)

    def increment(self, x):
        self.count()
        return self.body(x) * torch.cos(self.calls.sum().to(x.dtype))

    def count(self):
        self.calls.add_(1)


class CountingIntegers(Counting):
    def initial(self):
        return torch.zeros((), dtype=torch.int64)


class CountingVector(Counting):
    def initial(self):
        return torch.zeros(3)


class Flipping(Counting):
    def initial(self):
        return torch.zeros(2, dtype=torch.bool)

    def count(self):
        self.calls.logical_not_()


class Replacing(Counting):
    def count(self):
        self.calls = self.calls + 1


class LazilyCounting(Counting):
    def initial(self):
        return None

    def count(self):
        if self.calls is None:
            self.calls = torch.zeros(2)
        self.calls.add_(1)


class Registering(FuzzBlock):
    """Registers its buffer when it first runs."""

    def increment(self, x):
        if "calls" not in self._buffers:
            self.register_buffer("calls", torch.zeros(2))
        self.calls.add_(1)
        return self.body(x) * torch.cos(self.calls.sum())


class SharedMemory(Counting):
    """Two buffers, of which one is a part of the other: it writes the one and reads the other."""

    def made(self):
        body = super().made()
        self.register_buffer("part", self.calls[:1])
        return body

    def initial(self):
        return torch.zeros(3)

    def count(self):
        self.part.add_(1)


class Averaging(FuzzBlock):
    """Keeps a running mean of its inputs and reads it before it writes it."""

    def made(self):
        self.register_buffer("mean", torch.zeros(1, DIM))
        return super().made()

    def increment(self, x):
        out = self.body(x - self.mean.to(x.dtype).clone())
        with torch.no_grad():
            self.mean.lerp_(x.reshape(-1, DIM).mean(dim=0, keepdim=True).to(self.mean.dtype), 0.3)
        return out


class ReadingBuffers(FuzzBlock):
    """Reads buffers of several dtypes and writes none."""

    def made(self):
        self.register_buffer("scale", torch.full((1, DIM), 0.7))
        self.register_buffer("order", torch.arange(DIM).flip(0))
        self.register_buffer("mask", torch.arange(DIM) % 2 == 0)
        return super().made()

    def increment(self, x):
        return torch.where(self.mask, self.body(x)[..., self.order], x) * self.scale.to(x.dtype)


class CountingInPython(FuzzBlock):
    """Its counter is an attribute."""

    def made(self):
        self.calls = 0
        return super().made()

    def increment(self, x):
        self.calls += 1
        return self.body(x) * torch.tensor(float(self.calls), dtype=x.dtype).cos()


class Remembering(FuzzBlock):
    """Its memory is a list, and a tensor that is no buffer."""

    def made(self):
        self.seen, self.total = [], torch.zeros(())
        return super().made()

    def increment(self, x):
        self.seen.append(1)
        self.total += 1
        return self.body(x) * torch.tensor(len(self.seen) + self.total.item(), dtype=x.dtype).cos()


class ReadingAttributes(FuzzBlock):
    """Depends on attributes that it does not change."""

    def made(self):
        self.scale, self.offsets = 0.7, [0.1, 0.2]
        return nn.Sequential(super().made(), nn.Dropout(0.4))

    def increment(self, x):
        return self.body(x) * self.scale + sum(self.offsets)


class WritingItsParameter(FuzzBlock):
    """Rescales a weight in its own forward pass, as constraints on weights do."""

    def made(self):
        self.weight = nn.Parameter(torch.full((DIM,), 0.5))
        return super().made()

    def increment(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return self.body(x) * self.weight


class Memoising(FuzzBlock):
    """Keeps what it computed from its weight when it first ran."""

    def made(self):
        self.memo = None
        return super().made()

    def increment(self, x):
        if self.memo is None:
            self.memo = self.body[0].weight.square().mean()
        return self.body(x) * self.memo


class Tabulating(FuzzBlock):
    """Keeps a table of constants that it made when it first ran."""

    def made(self):
        self.table = None
        return super().made()

    def increment(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, DIM, dtype=x.dtype)
        return self.body(x) * self.table


class Board(FuzzBlock):
    """Shares a buffer with others of its kind: every second one writes it, all read it."""

    dtype = torch.float64

    def made(self):
        self.board, self.is_writing = nn.Module(), False
        self.board.register_buffer("level", torch.zeros(1, 1, dtype=self.dtype))
        return super().made()

    def join(self, earlier):
        others = [block for block in earlier if type(block) is type(self)]
        self.board = others[0].board if others else self.board
        self.is_writing = len(others) % 2 == 1

    def increment(self, x):
        if self.is_writing:
            self.board.level.add_(1)
        return self.body(x) * self.board.level.to(x.dtype).cos().sum()


class IntegerBoard(Board):
    dtype = torch.int64


class SparseGradients(FuzzBlock):
    """Its weights get sparse gradients."""

    def made(self):
        self.table = nn.Embedding(4, DIM, sparse=True)
        return nn.Tanh()

    def increment(self, x):
        return self.body(x) * self.table(torch.tensor([1, 3, 1])).sum(dim=0)


class DefaultDtype(FuzzBlock):
    """Makes a constant in the default dtype."""

    def increment(self, x):
        return self.body(x) * torch.linspace(0.1, 1, DIM).to(x.dtype)


class MakingLeaves(FuzzBlock):
    """Differentiates inside itself, for a leaf that it makes: the gradient of an energy."""

    def increment(self, x):
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.body(point).square().sum()
            (force,) = torch.autograd.grad(energy, point, create_graph=True)
        return force


class LookingAtGradients(FuzzBlock):
    """Computes something else where no gradients are recorded."""

    def increment(self, x):
        return self.body(x) * (2 if torch.is_grad_enabled() else 1)


class Encoder(FuzzBlock):
    """torch's encoder layers take another path in eval mode where no gradients are recorded."""

    def made(self):
        layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, dropout=0.2, batch_first=True)
        return nn.TransformerEncoder(layer, 1)

    def increment(self, x):
        tokens = x.reshape(ROWS, -1, DIM)
        padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        padding[:, -1] = tokens.shape[1] > 1
        out = self.body(tokens, src_key_padding_mask=padding)
        return nn.functional.pad(out, (0, 0, 0, tokens.shape[1] - out.shape[1])).reshape(x.shape)


class Leaking(FuzzBlock):
    """Depends on a leaf that is registered nowhere."""

    def made(self):
        self.hidden = [torch.randn(DIM, requires_grad=True)]
        return super().made()

    def increment(self, x):
        return self.body(x) * self.hidden[0].to(x.dtype)


class WritingItsInput(FuzzBlock):
    def increment(self, x):
        return x.mul_(0.5)


STATEFUL_BLOCKS = {
    "counter": Counting,
    "integer_counter": CountingIntegers,
    "vector_counter": CountingVector,
    "flag": Flipping,
    "replaced_buffer": Replacing,
    "lazy_buffer": LazilyCounting,
    "registered_buffer": Registering,
    "shared_buffers": SharedMemory,
    "running_mean": Averaging,
    "reads_buffers": ReadingBuffers,
    "python_counter": CountingInPython,
    "python_memory": Remembering,
    "reads_attributes": ReadingAttributes,
    "writes_parameter": WritingItsParameter,
    "memoises_weight": Memoising,
    "memoises_table": Tabulating,
    "board": Board,
    "integer_board": IntegerBoard,
    "sparse": SparseGradients,
    "default_dtype": DefaultDtype,
    "makes_leaves": MakingLeaves,
    "looks_at_grad_mode": LookingAtGradients,
    "encoder": Encoder,
    "leaks": Leaking,
    "writes_input": WritingItsInput,
}
