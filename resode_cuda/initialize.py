"""Weights that vary smoothly with depth: a fresh stack's, and those of a deeper copy of a stack.

The reverse solvers reach the orders they state where neighbouring blocks differ by O(1/N); blocks initialised one by
one differ by O(1), however deep the stack.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .method import CheckedAnchors
from .mlp import ResidualMLP
from .reverse import Reverse
from .stack import ResidualStack

Smoothed = TypeVar("Smoothed", ResidualStack, ResidualMLP)


@torch.no_grad()
def smooth_init_(stack: Smoothed) -> Smoothed:
    """Make freshly initialised weights vary smoothly with depth, in place.

    theta(t) = m + cos(pi t/2) (A - m) + sin(pi t/2) (B - m),   t = n / (count - 1)

    for the parameter of each name, in block n of `count`; A and B are its values in the first and the last block, m
    the scalar mean over both. Because cos^2 + sin^2 = 1, weights of independent A and B keep their variance at every
    depth; linear interpolation would halve it midway. Where A = B (norm weights, zero biases, copies of one block) all
    blocks get that value.

    The reverse solvers are at their best on such weights: blocks that vary smoothly with depth give a gradient
    error of O(h^p), h = 1/N, with the orders p that `Reverse` states; independent blocks give a lower order.

    Args:
        stack: a `ResidualMLP`, or a `ResidualStack` of blocks that all have the same parameters, freshly initialised.
            The parameter objects, their dtypes, devices and `requires_grad` stay, so an optimizer may already hold
            them. The first and the last block, all buffers and frozen parameters (`requires_grad=False`, such as
            pretrained weights) keep their values; frozen ends are interpolated between as others are. A tensor that
            several blocks share is written at the first of them; one that the first or the last block holds is not
            written.

    Returns:
        The stack.

    Raises:
        TypeError: if stack is neither of the two.
        ValueError: if blocks differ in names or shapes of their parameters, or a parameter has no floating values yet.

    Source: the regime of weights tied or smooth in depth at initialisation that Sander, Ablin and Peyré, NeurIPS 2022,
    arXiv:2205.14612, study; the interpolation is this library's.
    """
    blocks = _layers(stack) if isinstance(stack, ResidualMLP) else parameters_of_blocks("smooth_init_", stack)
    first, last = blocks[0], blocks[-1]
    done = {id(parameter) for end in (first, last) for parameter in end.values()}
    for n, block in enumerate(blocks):
        angle = math.pi / 2 * n / max(len(blocks) - 1, 1)
        for name, parameter in block.items():
            if id(parameter) in done or not parameter.requires_grad:
                continue
            done.add(id(parameter))
            a, b = (_wide(end[name], like=parameter) for end in (first, last))
            if torch.equal(a, b):
                parameter.copy_(a)
                continue
            m = (a.mean() + b.mean()) / 2
            parameter.copy_(m + math.cos(angle) * (a - m) + math.sin(angle) * (b - m))
    return stack


@torch.no_grad()
def deepen(stack: ResidualStack, steps: int) -> ResidualStack:
    """A new stack of more steps that follows the same flow, to go on training a shallow stack at greater depth.

    theta_m = (1 - w) theta_k + w theta_{k+1},   h_m = t(u_{m+1}) - t(u_m)
    u_m = m N / steps = k + w,   k = floor(u_m),   t(u_m) = h_0 + ... + h_{k-1} + w h_k

    The old block k stands at time t_k = h_0 + ... + h_{k-1}: parameters are interpolated linearly in that time, and
    past the last block they are its own. The total time t(N) is kept, and equal steps stay equal. Neighbouring blocks
    come closer together by the factor N / steps, which the reverse solvers gain from.

    Args:
        stack: N steps, blocks that all have the same parameters. It is not changed.
        steps: steps of the new stack, >= N. N gives an exact copy.

    Returns:
        A `ResidualStack` of the same scheme and settings; steps anchored by number stay anchored, at the first new step
        that begins there or after. `drift` starts empty. Each block is a deep copy of the nearest old block (the
        earlier of two) with its parameters interpolated: buffers, attributes, hooks, dtype, device, train/eval and
        `requires_grad` flags are that block's. Modules and parameters that old blocks share become independent copies;
        modules that a subclass holds besides its blocks are left out. For weights smooth in depth the output differs
        from the old one's by O(1/N) under Euler, O(1/N^2) under Heun.

    Raises:
        TypeError: if stack is not a ResidualStack, or steps not an int.
        ValueError: if steps is below N, or above it where form="block", blocks differ in names or shapes of their
            parameters, or a parameter has no floating values yet.

    Source: blocks as samples of a function of time, Sander, Ablin and Peyré, NeurIPS 2022, arXiv:2205.14612.
    """
    old = parameters_of_blocks("deepen", stack)
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"deepen: steps must be an integer, got {steps!r}")
    count = len(stack.steps)
    if steps < count:
        raise ValueError(f"deepen: steps must be >= {count}, the stack's own, got {steps}; deepen only deepens")
    if stack.form == "block" and steps > count:
        raise ValueError(
            'deepen: blocks must return increments, got a stack with form="block", whose step h = 1 cannot be divided; '
            'take the addition out of the blocks, and use form="residual" with step=1.0'
        )
    blocks = []
    for m in range(steps + len(stack) - count):
        u = min(Fraction(m * count, steps), Fraction(len(stack) - 1))
        k, nearest = math.floor(u), math.ceil(u - Fraction(1, 2))
        block = copy.deepcopy(stack[nearest])
        if u != k:  # a block at an old place keeps every bit, those of -0.0 too
            for name, parameter in block.named_parameters(remove_duplicate=False):
                a, b = (_wide(old[end][name], like=parameter) for end in (k, k + 1))
                parameter.copy_(torch.lerp(a, b, float(u - k)))
        blocks.append(block)
    changed = {
        "step": _refined(stack.steps, steps),
        "anchors": _deeper_anchors(stack, steps),
        "reverse": _deeper_solver(stack, steps),
    }
    deeper = ResidualStack(blocks, **{**stack.settings(), **changed})
    deeper.training = stack.training  # train() would also overwrite the blocks' own flags
    return deeper


def _deeper_anchors(stack: ResidualStack, steps: int) -> CheckedAnchors:
    """The new steps that begin where the stack's anchored steps do, or first after them."""
    anchors, count = stack.anchors, len(stack.steps)
    return tuple(-(-n * steps // count) for n in anchors) if isinstance(anchors, tuple) else anchors


def _deeper_solver(stack: ResidualStack, steps: int) -> Reverse:
    """The stack's, each new step with the bits of the old one that it lies in."""
    solver, count = stack.reverse, len(stack.steps)
    if not isinstance(solver.bits, tuple):
        return solver
    return replace(solver, bits=tuple(solver.bits[m * count // steps] for m in range(steps)))


def _layers(mlp: ResidualMLP) -> list[dict[str, Tensor]]:
    """Views of each layer's parameters by name, frozen where these are."""
    if mlp.weight_in.is_meta:
        raise ValueError(
            "smooth_init_: parameters must have values, got a ResidualMLP on the meta device; move it from there and "
            "call its reset_parameters() first"
        )
    stacked = {
        name: [layer.requires_grad_(parameter.requires_grad) for layer in parameter.detach().unbind()]
        for name, parameter in mlp.named_parameters()
    }
    return [{name: layers[n] for name, layers in stacked.items()} for n in range(mlp.weight_in.shape[0])]


def _refined(old: tuple[float, ...], steps: int) -> list[float]:
    # Fractions: steps that are equal have to stay equal to the last bit, where the extrapolation takes its short way.
    times = [Fraction(0)]
    for h in old:
        times.append(times[-1] + Fraction(h))

    def time(m: int) -> Fraction:
        k, rest = divmod(m * len(old), steps)
        return times[k] + (Fraction(rest, steps) * Fraction(old[k]) if rest else 0)

    return [float(time(m + 1) - time(m)) for m in range(steps)]


def parameters_of_blocks(where: str, stack: ResidualStack) -> list[dict[str, Tensor]]:
    """Each block's parameters by name, a shared one under all its names."""
    if not isinstance(stack, ResidualStack):
        raise TypeError(f"{where}: stack must be a ResidualStack, got {type(stack).__name__}")
    blocks: list[dict[str, Tensor]] = [dict(block.named_parameters(remove_duplicate=False)) for block in stack]
    for n, block in enumerate(blocks):
        for name, parameter in block.items():
            if is_lazy(parameter) or parameter.is_meta:
                raise ValueError(
                    f"{where}: parameters must have values, got {name!r} of block {n} without; run the stack once, or "
                    "move it from the meta device and initialise it, first"
                )
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(
                    f"{where}: parameters must be floating to be interpolated, got {name!r} of block {n} with "
                    f"{parameter.dtype}; make it a buffer, or quantise later"
                )
        if odd := sorted(block.keys() ^ blocks[0].keys()):
            holder, other = (n, 0) if odd[0] in block else (0, n)
            raise ValueError(
                f"{where}: all blocks must have the same parameters, got {odd[0]!r} in block {holder} but not in block "
                f"{other}; use blocks of one architecture"
            )
        for name, parameter in block.items():
            if parameter.shape != blocks[0][name].shape:
                raise ValueError(
                    f"{where}: all blocks must have parameters of the same shapes, got {name!r} "
                    f"{list(blocks[0][name].shape)} in block 0, {list(parameter.shape)} in block {n}; use blocks of "
                    "one architecture"
                )
    return blocks


def _wide(values: Tensor, like: Tensor) -> Tensor:
    # 16-bit values are interpolated in float32 and rounded once.
    return values.to(like.device, torch.promote_types(torch.promote_types(values.dtype, like.dtype), torch.float32))
