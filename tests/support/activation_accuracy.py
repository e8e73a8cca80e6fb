"""How exact the activations of the Triton kernels are, against float64, by the form that a dtype takes.

    TRITON_INTERPRET=1 python -m tests.support.activation_accuracy    prints the table of docs/kernels.md

In float32 and float16 sigmoid and tanh are plain, in bfloat16 those of SiLU and tanh are the special function unit's
approximate tanh. Without a GPU the plain form is computed in Triton's interpreter, whose exponential is exact; of the
approximate one there is a bound: the formulas in float64 with the most that PTX allows tanh.approx.f32 to be off, by
either sign.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from resode_cuda.fused.triton.layer import activate
from tests.support.ptx.arithmetic import LARGEST_ERRORS

REACHES = 1, 4, 8
GATED = "silu", "gelu_tanh", "tanh"
"""Names of activations that have an approximate form, whether the kernels take it or not."""


@dataclass(frozen=True)
class ActivationConfig:
    activation: str
    approximates: bool


@triton.jit
def activation_kernel(z, value, slope, COUNT: tl.constexpr, CONFIG: tl.constexpr):
    places = tl.arange(0, COUNT)
    activated = activate(tl.load(z + places), CONFIG)
    tl.store(value + places, activated.value)
    tl.store(slope + places, activated.slope)


def activated(name, approximates, z):
    """(s(z), s'(z)) of as many float32 values as a power of two, by the kernels' formulas."""
    value, slope = torch.empty_like(z), torch.empty_like(z)
    activation_kernel[(1,)](z, value, slope, COUNT=len(z), CONFIG=ActivationConfig(name, approximates))
    return value, slope


def exact(name, z):
    """(s(z), s'(z)) in float64."""
    z = z.double().requires_grad_()
    function = {
        "identity": lambda z: z * 1,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }[name]
    value = function(z)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def bounds(name, z):
    """The largest errors of the approximate form's value and slope at each z."""
    z = z.double()
    worst = torch.zeros_like(z), torch.zeros_like(z)
    for sign in (1, -1):
        factor = 1 + sign * LARGEST_ERRORS["tanh"]
        if name == "tanh":
            a = torch.tanh(z) * factor
            found = a, 1 - a * a
        else:
            square = z * z if name == "gelu_tanh" else torch.zeros_like(z)
            linear = 2 * (2 / torch.pi) ** 0.5 if name == "gelu_tanh" else 1.0
            p = 0.5 + 0.5 * factor * torch.tanh(0.5 * linear * z * (1 + 0.044715 * square))
            found = z * p, p + z * p * (1 - p) * linear * (1 + 0.134145 * square)
        worst = tuple(
            torch.maximum(most, (one - other).abs())
            for most, one, other in zip(worst, found, exact(name, z), strict=True)
        )
    return worst


def errors(name, approximates, reach):
    """The largest errors of value and slope up to |z| = reach."""
    z = torch.linspace(-reach, reach, 4096)
    if approximates:
        found = bounds(name, z)
    else:
        found = [(one - other).abs() for one, other in zip(activated(name, False, z), exact(name, z), strict=True)]
    return tuple(error.max().item() for error in found)


def main():
    print("| activation | up to \\|z\\| | plain: value | slope | approximate, at most: value | slope |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in GATED:
        for reach in REACHES:
            figures = (f"{error:.1e}" for form in (False, True) for error in errors(name, form, reach))
            print(f"| {name} | {reach} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
