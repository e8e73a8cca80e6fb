"""Parameters as functions of depth: how smooth they are, and gradients that keep them so.

The parameter of one name in the blocks 0 ... B - 1 is a function theta(t) at the places t = n / (B - 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .mlp import ResidualMLP
from .stack import ResidualStack
from .stages.finding import stages_of


@torch.no_grad()
def smooth_gradients_(stack: nn.Module, alpha: float) -> None:
    """Smooth the parameters' gradients along depth, in place: g <- (I - alpha^2 d^2/dt^2)^{-1} g.

    dg/dt is 0 at the ends. Call it after the backward pass, before gradients are clipped and the optimizer steps. It is
    the gradient in the Sobolev space H^1 of functions of depth: weights that start tied, zero or smooth
    (`smooth_init_`) stay smooth in depth, which the reverse solvers gain from. The sum of a gradient over depth stays
    what it is, so what all blocks have in common is trained as before. Networks of h = 1 whose blocks were initialised
    one by one have nothing smooth to keep, and gain nothing.

    Args:
        stack: a `ResidualStack`, whose parameters are matched by name from block to block, a `ResidualMLP`, or a model
            that `convert` has converted, each of whose stages is smoothed. Where a block has no parameter of a name and
            shape, or no gradient, as where it is frozen, the blocks on either side are smoothed apart. A parameter that
            successive blocks share counts once.
        alpha: the distance in depth over which gradients are smoothed, where the whole stack is 1; 0 leaves them alone.

    Raises:
        TypeError: if stack is none of these, alpha is no number, or a gradient is sparse.
        ValueError: if alpha is negative or not finite.

    Source: Baravdish et al., arXiv:2202.05766, for neural ODEs whose parameters vary with depth.
    """
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"smooth_gradients_: alpha must be a number, got {alpha!r}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"smooth_gradients_: alpha must be finite and >= 0, got {alpha}")
    stacks: list[nn.Module] = [stage.stack for stage in stages_of(stack)]
    for one in stacks or [stack]:
        places = _block_count("smooth_gradients_", one) - 1
        for name, gradients in profiles(one, lambda parameter: parameter.grad):
            if any(gradient.layout != torch.strided for gradient in gradients):
                raise TypeError(
                    f"smooth_gradients_: gradients must be dense, got one of {name!r} that is not; use sparse=False"
                )
            if alpha and len(gradients) > 1:
                _smooth_(gradients, (alpha * places) ** 2)


@torch.no_grad()
def roughness(stack: ResidualStack | ResidualMLP) -> dict[str, float]:
    """N max |theta_{n+1} - theta_n| of each parameter by name, N being the number of blocks less 1.

    It is the largest derivative along depth, and stays bounded as N grows where weights are smooth. Norms are those of
    all values of a parameter together, of a matrix the Frobenius norm. Names of one block alone are left out.

    Raises:
        TypeError: if stack is neither a `ResidualStack` nor a `ResidualMLP`.
    """
    places = _block_count("roughness", stack) - 1
    found: dict[str, float] = {}
    for name, values in profiles(stack, lambda parameter: parameter.detach()):
        for before, after in itertools.pairwise(values):
            found[name] = max(found.get(name, 0.0), places * (after - before).norm().item())
    return found


def _smooth_(gradients: Sequence[Tensor], strength: float) -> None:
    """Solve (I + strength D^T D) g' = g in place, where D takes differences of neighbours.

    The matrix is tridiagonal: elimination down the depth, substitution back up, a few operations a block.
    """
    wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    last, ratios = len(wide) - 1, [0.0]
    for n, g in enumerate(wide):
        diagonal = 1 + strength * (1 if n in (0, last) else 2) - strength * ratios[-1]
        if n:
            g = wide[n] = g.add(wide[n - 1], alpha=strength)
        wide[n] = g / diagonal
        ratios.append(strength / diagonal)
    for n in reversed(range(last)):
        wide[n].add_(wide[n + 1], alpha=ratios[n + 1])
    for gradient, smoothed in zip(gradients, wide, strict=True):
        gradient.copy_(smoothed)


def _block_count(where: str, stack: nn.Module) -> int:
    if isinstance(stack, ResidualMLP):
        return stack.weight_in.shape[0]
    if not isinstance(stack, ResidualStack):
        raise TypeError(
            f"{where}: stack must be a ResidualStack or a ResidualMLP, got {type(stack).__name__}; of another model "
            "`convert` makes stages, whose gradients smooth_gradients_ takes"
        )
    return len(stack)


def profiles(stack: nn.Module, value: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[str, list[Tensor]]]:
    """A value of each parameter, in those successive blocks that have one of its name, shape and kind.

    A parameter that successive blocks share comes once.
    """
    if isinstance(stack, ResidualMLP):
        for name, parameter in stack.named_parameters():
            stacked = value(parameter)
            if stacked is not None:
                yield name, list(stacked.unbind())
        return
    assert isinstance(stack, ResidualStack)
    blocks = [dict(block.named_parameters(remove_duplicate=False)) for block in stack]
    for name in dict.fromkeys(itertools.chain(*blocks)):
        held = [next(shared) for _, shared in itertools.groupby((block.get(name) for block in blocks), id)]
        values = [None if parameter is None else value(parameter) for parameter in held]
        for kind, profile in itertools.groupby(values, lambda v: None if v is None else (v.shape, v.dtype, v.device)):
            if kind is not None:
                yield name, [v for v in profile if v is not None]
