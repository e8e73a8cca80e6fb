"""Blocks of random networks: the ordinary ones, whose outputs depend on nothing but their input and random numbers.

Every block maps states [..., 6] (or images [rows, 6, 3, 3]) to gain * body(x), times a factor that depends on whatever
the stack was given beside the state, see `arguments.conditioned`. The gain makes the network contract.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.support.fuzz.arguments import conditioned

DIM, HIDDEN, ROWS, SIDE = 6, 8, 3, 3


class FuzzBlock(nn.Module):
    """gain * body(x), conditioned on the arguments."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.body = self.made()

    def join(self, earlier: list[nn.Module]) -> None:
        """Share something with blocks before this one."""

    def made(self) -> nn.Module | None:
        return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, DIM))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.gain * conditioned(self.increment(x), args, kwargs)

    def increment(self, x: Tensor) -> Tensor:
        return self.body(x)


class Mlp(FuzzBlock):
    pass


class LayerNormed(FuzzBlock):
    def made(self):
        return nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))


class Parameterless(FuzzBlock):
    def made(self):
        return nn.Tanh()


class Frozen(FuzzBlock):
    def made(self):
        return super().made().requires_grad_(False)


class Constant(FuzzBlock):
    """Its output does not depend on the state; nor does anything depend on one of its parameters."""

    def made(self):
        self.unused, self.value = nn.Parameter(torch.ones(2)), nn.Parameter(torch.randn(DIM))
        return None

    def increment(self, x):
        return self.value * torch.ones_like(x)


class Zero(FuzzBlock):
    """An output without a graph."""

    def made(self):
        return None

    def increment(self, x):
        return torch.zeros_like(x)


class Itself(FuzzBlock):
    """Returns the very tensor that it was given."""

    def made(self):
        return None

    def forward(self, x, *args, **kwargs):
        return x


class Broadcast(FuzzBlock):
    """Returns a tensor whose elements share memory."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs).mean(dim=0, keepdim=True).expand_as(x)


class Transposed(FuzzBlock):
    """Returns a tensor with strides of its own."""

    def increment(self, x):
        out = super().increment(x)
        return out.transpose(0, -1).contiguous().transpose(0, -1)


class Detached(FuzzBlock):
    """Its gradient stops on one of two paths; the other passes through a region without gradients."""

    def increment(self, x):
        with torch.no_grad():
            scale = 1 + x.square().mean()
        return self.body(x) / scale + self.body(x.detach()).sin()


class WritesItsIntermediates(FuzzBlock):
    def increment(self, x):
        hidden = self.body[0](x).mul_(2)
        hidden[..., :2].mul_(0.5)
        return self.body[1:](hidden).mul_(0.5).add_(x)


class SpoilsWhatIsSaved(FuzzBlock):
    """Writes a tensor that its own backward pass needs, which autograd refuses."""

    def increment(self, x):
        hidden = self.body[0](x).tanh_()
        out = self.body[2](hidden)
        hidden.mul_(2)
        return out


class Checkpointed(FuzzBlock):
    def increment(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class OwnAutocast(FuzzBlock):
    """A region in which autocast is off, whatever is on around it."""

    def increment(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.body(x.to(self.body[0].weight.dtype)).to(x.dtype)


class Spectral(FuzzBlock):
    """In training every use moves the power iteration of its norm on."""

    def made(self):
        body = super().made()
        parametrizations.spectral_norm(body[0])
        return body


class Parametrized(FuzzBlock):
    def made(self):
        body = super().made()
        parametrizations.weight_norm(body[0])
        parametrizations.orthogonal(body[2])
        return body


class Tied(FuzzBlock):
    """One weight in two places, the second transposed."""

    def increment(self, x):
        weight = self.body[0].weight
        return torch.tanh(x @ weight.T) @ weight


class ChannelsLast(FuzzBlock):
    """An image block on states of any kind: the last dimension is that of the channels."""

    def made(self):
        self.norm = self.normalised(4)
        return nn.Sequential(nn.Conv2d(DIM, 4, 3, padding=1), self.norm, nn.Softplus(), nn.Conv2d(4, DIM, 3, padding=1))

    def normalised(self, channels):
        return nn.BatchNorm2d(channels)

    def increment(self, x):
        images = x.reshape(ROWS, -1, 1, DIM).movedim(-1, 1)
        return self.body(images).movedim(1, -1).reshape(x.shape)


class CumulativeNormed(ChannelsLast):
    def normalised(self, channels):
        return nn.BatchNorm2d(channels, momentum=None)


class UntrackedNormed(ChannelsLast):
    def normalised(self, channels):
        return nn.BatchNorm2d(channels, track_running_stats=False)


class GroupNormed(ChannelsLast):
    """Its norm has no weights.

    torch's kernel for channels-last images on a CPU ends the process where the gradient of a weight, and not of the
    image, is asked for (torch 2.13).
    """

    def normalised(self, channels):
        return nn.GroupNorm(2, channels, affine=False)


class Recurrent(FuzzBlock):
    def made(self):
        return nn.GRU(DIM, DIM, batch_first=True)

    def increment(self, x):
        return self.body(x.reshape(ROWS, -1, DIM))[0].reshape(x.shape)


class Fourier(FuzzBlock):
    def increment(self, x):
        return torch.fft.irfft(torch.fft.rfft(self.body(x)) * 0.5j, n=DIM)


class SharingItsBody(FuzzBlock):
    """A block of its own around the body of an earlier one."""

    def join(self, earlier):
        self.body = next((block.body for block in earlier if type(block) in (Mlp, SharingItsBody)), self.body)


class SwitchingModes(ChannelsLast):
    """Puts its norm into eval mode whenever it runs, as frozen norms do."""

    def increment(self, x):
        self.norm.eval()
        return super().increment(x)


class CheckpointedState(ChannelsLast):
    """torch's checkpointing inside the block, of layers that draw and count."""

    def made(self):
        return nn.Sequential(super().made(), nn.Dropout(0.4))

    def increment(self, x):
        return checkpoint(super().increment, x, use_reentrant=False)


class Saturating(torch.autograd.Function):
    """tanh, with the gradient of the identity: a straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g


class StraightThrough(FuzzBlock):
    def increment(self, x):
        return self.body[2](Saturating.apply(self.body[0](x)))


ORDINARY_BLOCKS = {
    "mlp": Mlp,
    "layer_norm": LayerNormed,
    "parameterless": Parameterless,
    "frozen": Frozen,
    "constant": Constant,
    "zero": Zero,
    "itself": Itself,
    "broadcast": Broadcast,
    "transposed": Transposed,
    "detached": Detached,
    "writes_intermediates": WritesItsIntermediates,
    "spoils_saved": SpoilsWhatIsSaved,
    "checkpointed": Checkpointed,
    "own_autocast": OwnAutocast,
    "spectral": Spectral,
    "parametrized": Parametrized,
    "tied": Tied,
    "batch_norm": ChannelsLast,
    "cumulative_norm": CumulativeNormed,
    "untracked_norm": UntrackedNormed,
    "group_norm": GroupNormed,
    "recurrent": Recurrent,
    "fourier": Fourier,
    "shares_body": SharingItsBody,
    "switches_modes": SwitchingModes,
    "checkpointed_state": CheckpointedState,
    "straight_through": StraightThrough,
}
