"""Blocks that take arguments beside the state."""

from torch import nn

from tests.support.networks import mlp


class Conditioned(nn.Module):
    """A block with a scale, a shift inside a dict, a mask and a flag beside the state."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, scale, *, more, mask=None, negate=False):
        out = self.body(x) * scale + more["shift"][0]
        out = out if mask is None else out.masked_fill(mask, 0.0)
        return -out if negate else out
