"""Models of images in the tests: one that is converted, and its copy that is not."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from resode_cuda import conversion, convert
from tests.support.networks import relative_error

CLASSES = 7
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A small model."""

    make: Callable[[], nn.Module]
    size: int
    """Side of its images."""
    stages: dict[str, int]
    """What `convert` finds: layers by the stage's name."""
    error: float
    """The most that 8 bits may be off by after some training; kinks make it large."""
    left: tuple[str, ...] = ()
    """Layers that change the shape of their state."""

    def model(self, dtype=torch.float32):
        """In train mode."""
        torch.manual_seed(0)
        model = self.make().train()
        # timm's mixers and torchvision's transformers begin with a head of zeros, whose input has no gradient.
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == CLASSES:
                nn.init.normal_(module.weight, std=0.1)
        return model.to(dtype)

    def images(self, dtype=torch.float32, count=4):
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def pair(self, dtype=torch.float32, **options):
        """A converted model, and one that is not."""
        model = self.model(dtype)
        return convert(copy.deepcopy(model), **options), model


def loss_of(out):
    return nn.functional.cross_entropy(out.double(), torch.arange(len(out)) % CLASSES)


def step(model, x, loss=loss_of):
    """The output of a training pass, and the gradients of all parameters that have one."""
    torch.manual_seed(2)
    model.zero_grad()
    out = model(x)
    loss(out).backward()
    return out, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def trained(case, steps=20):
    """A model after training on a few images, and the images."""
    model, x = case.model(), case.images(count=8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        step(model, x)
        optimizer.step()
    return model, x


def passes(model):
    """How the last training pass ran each stage."""
    return [stage.last_pass for stage in conversion(model).stages]


def check_outputs(case, dtype):
    """Outputs, statistics of batch norms and names, in a training pass and in eval mode."""
    converted, plain = case.pair(dtype)
    x = case.images(dtype)
    keys = list(plain.state_dict())
    assert torch.equal(step(converted, x)[0], step(plain, x)[0])
    assert passes(converted) == ["as a stack"] * len(case.stages)
    for one, other in zip(converted.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(converted.eval()(x), plain.eval()(x))
    assert torch.equal(converted(x), plain(x))
    assert list(converted.state_dict()) == keys


def check_stages(case):
    told = conversion(convert(case.model()))
    assert {stage.path: stage.steps for stage in told.stages} == case.stages
    assert tuple(place.path for place in told.left_alone if "changes the shape" in place.reason) == case.left


def check_gradients(case):
    """Exact with all states kept; with 8 bits within the case's error, and nearer than under autocast."""
    model, x = trained(case)
    exact = step(copy.deepcopy(model).double(), x.double())[1]
    kept = convert(copy.deepcopy(model).double(), anchors=1)
    assert relative_error(step(kept, x.double())[1], exact) < 1e-10
    stored = relative_error(step(convert(copy.deepcopy(model).double()), x.double())[1], exact)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = [g.double() for g in step(model, x)[1]]
    assert 0 < stored < min(case.error, relative_error(autocast, exact))
