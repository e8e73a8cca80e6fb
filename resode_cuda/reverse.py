"""The reverse solver: how x_n is rebuilt from x_{n+1}.

Where increments are stored (`stored.py`) that is a subtraction, exact for the companion y = c_n.

Else one reverse step predicts y, corrects it k times by the fixed-point iteration y <- x_{n+1} - Phi_n(y), and hands y
to the adjoint, which evaluates Phi_n(y) anyway for its vector-Jacobian product. With reuse that evaluation also gives
the rebuilt state, x_n = x_{n+1} - Phi_n(y): one more correction that costs nothing. From the second correction on the
iteration can be accelerated by mixing two iterates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .schemes import BlockFunction, Scheme, add
from .stored import BITS

PREDICTORS = ("step", "extrapolate", "stored")
DEFAULT_BITS = 8
WORTHWHILE = 0.8
"""Iterates are mixed where that should shrink the residual at least to this share. Where less is to be gained the
model is too coarse to tell: of 10,800 rows of random networks on which the plain iteration converges, mixing the second
correction made the residual of 25% larger without this limit, and of 3% with it."""


@dataclass(frozen=True)
class Reverse:
    """A reverse solver: predictor, corrections, and whether the adjoint's own evaluation is reused.

    Args:
        predictor: `"step"` runs the scheme backwards from x_{n+1}, one more evaluation of the increment per step;
            `"extrapolate"` takes the increment expected from the two later steps, no evaluation. It needs weights that
            vary smoothly with depth. `"stored"` keeps the increments of the forward pass in a few bits: for networks
            that nothing can be rebuilt for, trained ones with h = 1 above all. The point y is then off by half a
            quantum at most, whatever the weights, and takes no evaluation; corrections, reuse and accelerate have no
            meaning.
        corrections: fixed-point iterations y <- x_{n+1} - Phi_n(y) after the predictor, >= 0. Each costs one
            evaluation per step and gains one order in h where h times the block's Lipschitz constant is below 1; above
            1 they diverge.
        reuse: take x_n = x_{n+1} - Phi_n(y) from the evaluation that the vector-Jacobian product needs anyway, and
            measure the defect |y - x_n| / |x_n|. Without it x_n = y and there is no defect, as in arXiv:2205.14612.
        accelerate: mix the last two iterates of the corrections (Anderson's method of depth 1), each sample with a
            coefficient of its own. A sample is what one index of the state's first dimension selects, of any module and
            state: [*] of [batch, *], one row of [rows, dim], and a state [dim] as a whole. (Where blocks act on rows of
            a state [batch, time, dim] alone, `x.flatten(0, 1)` makes each row a sample.) It costs two state-sized
            buffers and no evaluation, gains most on trained networks, where few directions dominate the error, and
            does not diverge where a single direction makes the plain iteration diverge. Samples in which mixing is not
            worthwhile take the plain iteration. None: from 2 corrections on, the fewest that can be mixed.
        bits: of each value of a stored increment, 1, 2, 3, 4, 6 or 8, or a sequence of them, one for each step; a
            quarter of a bit is added for scales. None is 8 for `"stored"`. The gradient's error halves with each bit.
        rounded_forward: blocks see the rounded states in the forward pass too, where gradients are on. The gradient is
            then exactly that of the network that ran, with rounding taken as the identity: c_n comes back
            equal to the last bit. Without gradients the plain network runs.

    The presets of `ResidualStack(reverse=...)`, with the order in h of the gradient's relative error, measured for
    weights smooth in depth, and the evaluations of the increment per backward step:

        "paper"         Reverse("step", reuse=False)   Euler 1, Heun 3   2 evaluations
        "corrected"     Reverse("step")                Euler 2, Heun 4   2 evaluations
        "extrapolated"  Reverse("extrapolate")         Euler 3, Heun 3   1 evaluation, as many as checkpointing
        "stored"        Reverse("stored", bits=8)      none: any h       1 evaluation

    Raises:
        ValueError: for an unknown predictor, negative corrections, extrapolation without reuse, acceleration of fewer
            than 2 corrections, numbers of bits that there are not, corrections or acceleration of stored increments, or
            bits of increments that are not stored.
        TypeError: if corrections is not an integer, reuse or rounded_forward not a bool, bits no integers, or
            accelerate neither a bool nor None.

    Source of the acceleration: D. G. Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12, 1965.
    """

    predictor: str = "step"
    corrections: int = 0
    reuse: bool = True
    accelerate: bool | None = None
    bits: int | tuple[int, ...] | None = None
    rounded_forward: bool = False

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise ValueError(f"Reverse: predictor must be one of {PREDICTORS}, got {self.predictor!r}")
        if not isinstance(self.rounded_forward, bool):
            raise TypeError(f"Reverse: rounded_forward must be True or False, got {self.rounded_forward!r}")
        if self.is_stored:
            self._check_stored()
        elif self.bits is not None or self.rounded_forward:
            raise ValueError(
                f'Reverse: bits and rounded_forward must go with predictor="stored", got {self.predictor!r}; leave '
                "them out"
            )
        if not isinstance(self.corrections, int) or isinstance(self.corrections, bool):
            raise TypeError(f"Reverse: corrections must be an integer, got {self.corrections!r}; use 0, 1, 2, ...")
        if self.corrections < 0:
            raise ValueError(f"Reverse: corrections must be >= 0, got {self.corrections}; use 0 for none")
        if not isinstance(self.reuse, bool):
            raise TypeError(f"Reverse: reuse must be True or False, got {self.reuse!r}")
        if self.predictor == "extrapolate" and not self.reuse:
            raise ValueError(
                'Reverse: predictor="extrapolate" needs reuse=True, got reuse=False; it continues the increments '
                "that reuse keeps"
            )
        if self.accelerate is None:
            object.__setattr__(self, "accelerate", self.corrections >= 2)
        if not isinstance(self.accelerate, bool):
            raise TypeError(f"Reverse: accelerate must be True, False or None, got {self.accelerate!r}")
        if self.accelerate and self.corrections < 2:
            raise ValueError(
                f"Reverse: accelerate=True needs corrections >= 2, got {self.corrections}; it mixes two of them"
            )

    def _check_stored(self) -> None:
        if self.corrections or self.accelerate:
            raise ValueError(
                'Reverse: predictor="stored" must have no corrections and no acceleration, got '
                f"corrections={self.corrections!r}, accelerate={self.accelerate!r}; leave them out, and use more bits"
            )
        given: Any = DEFAULT_BITS if self.bits is None else self.bits
        is_sequence = isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", 1) > 0
        numbers = [integer(n) for n in given] if is_sequence else [integer(given)]
        if None in numbers:
            raise TypeError(f"Reverse: bits must be an integer, or one for each step, got {given!r}")
        if not numbers or any(n not in BITS for n in numbers):
            raise ValueError(f"Reverse: bits must be among {BITS}, got {given!r}")
        object.__setattr__(self, "bits", tuple(numbers) if is_sequence else numbers[0])
        # The evaluation at y rebuilds nothing.
        object.__setattr__(self, "reuse", False)

    @property
    def is_stored(self) -> bool:
        return self.predictor == "stored"

    @property
    def extrapolates(self) -> bool:
        return self.predictor == "extrapolate"

    def bits_of(self, n: int) -> int:
        """Bits a value of step n's stored increment."""
        assert self.bits is not None, "only stored increments have bits"
        return self.bits if isinstance(self.bits, int) else self.bits[n]

    @property
    def evaluations(self) -> int:
        """Evaluations of the increment in a backward step that is neither anchored nor one of the first two."""
        return 1 + self.corrections + (self.predictor == "step")


def integer(value: object) -> int | None:
    """An integer of any kind, NumPy's and torch's too, as Python's; None for what is none.

    Tensors of one element are collections, and truth values are no numbers.
    """
    is_truth_value = isinstance(value, bool) or str(getattr(value, "dtype", None)) in ("bool", "torch.bool")
    if is_truth_value or getattr(value, "ndim", 0) > 0:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


PRESETS = {
    "paper": Reverse("step", reuse=False),
    "corrected": Reverse("step"),
    "extrapolated": Reverse("extrapolate"),
    "stored": Reverse("stored"),
}


def solver_from(where: str, reverse: str | Reverse) -> Reverse:
    """The solver that `reverse=...` names."""
    if isinstance(reverse, Reverse):
        return reverse
    if isinstance(reverse, str) and reverse in PRESETS:
        return PRESETS[reverse]
    raise ValueError(f"{where}: reverse must be one of {tuple(PRESETS)} or a Reverse, got {reverse!r}")


def predict(
    solver: Reverse,
    scheme: type[Scheme],
    blocks: Sequence[BlockFunction],
    x_next: Tensor,
    h: float,
    predicted: Tensor | None,
) -> Tensor:
    """The point y at which the adjoint evaluates the step that led to x_next.

    `predicted` is x_next less the increment expected of this step; None where the reverse step has to predict.
    """
    y = scheme.reverse_step(blocks, x_next, h) if predicted is None else predicted
    return corrected(solver, y, lambda y: scheme.add(x_next, scheme.stages(blocks, y, h), -h))


def corrected(solver: Reverse, y: Tensor, step_back: Callable[[Tensor], Tensor]) -> Tensor:
    """y after the solver's corrections.

    Args:
        step_back: y -> x_{n+1} - Phi_n(y), in a tensor that neither it nor the caller uses again.
    """
    fresh_before = residual_before = None
    for _ in range(solver.corrections):
        fresh = step_back(y)
        if not solver.accelerate:
            y = fresh
            continue
        residual = fresh - y
        y = fresh
        if fresh_before is not None and residual_before is not None:
            y = _mixed(fresh, residual, fresh_before, residual_before)
        fresh_before, residual_before = fresh, residual
    return y


def _mixed(fresh: Tensor, residual: Tensor, fresh_before: Tensor, residual_before: Tensor) -> Tensor:
    """The combination of the last two images of the fixed-point iteration whose residual should be smallest.

    r and r' are the residuals, image minus iterate, of this iterate and of the one before. To first order the residual
    of a mixture is r - theta (r - r'), smallest at theta = <r, r - r'> / |r - r'|^2, sample by sample. The images and
    residuals from before are overwritten.
    """
    if not residual.numel():
        return fresh
    change = torch.sub(residual, residual_before, out=residual_before)
    scale = _reciprocal_size(residual)
    along, length, whole = (
        _scaled_dots(a, b, scale) for a, b in ((residual, change), (change, change), (residual, residual))
    )
    # By theta the square of the residual falls by along^2 / length. False, too, where nothing changes any more.
    worthwhile = along * along > (1 - WORTHWHILE**2) * whole * length
    theta = torch.where(worthwhile, along / length, 0).to(fresh.dtype)
    return torch.addcmul(fresh, theta, torch.sub(fresh, fresh_before, out=fresh_before), value=-1)


def _reciprocal_size(states: Tensor) -> Tensor:
    """1 / max |x| of each sample, all other dimensions kept as ones."""
    within = _within_a_sample(states)
    size = torch.maximum(states.amax(within, keepdim=True), -states.amin(within, keepdim=True))
    return size.clamp_min(torch.finfo(states.dtype).tiny).reciprocal()


def _scaled_dots(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """scale^2 <a, b> of each sample, all other dimensions kept as ones.

    With the reciprocal of their size as scale, products are neither too large nor too small for the dtype.
    """
    products = torch.mul(a, scale).mul_(b)
    dtype = torch.promote_types(products.dtype, torch.float32)
    return products.sum(_within_a_sample(products), keepdim=True, dtype=dtype) * scale


def _within_a_sample(states: Tensor) -> tuple[int, ...]:
    """All dimensions but the first. A state of one dimension is one sample."""
    return tuple(range(min(1, states.ndim - 1), states.ndim))


def extrapolation_weights(scheme: type[Scheme], steps: Sequence[float], n: int) -> tuple[float, float]:
    """(a, b) such that step n is expected to add a d_{n+1} - b d_{n+2}.

    The rates d/h of the two later steps are continued linearly to step n in the time t_n = h_0 + ... + h_{n-1}; equal
    steps give (2, 1).
    """
    h, h1, h2 = steps[n : n + 3]
    here, later = scheme.sample_point, 1 - scheme.sample_point
    ratio = quotient(later * h + here * h1, later * h1 + here * h2)
    return quotient((1 + ratio) * h, h1), quotient(ratio * h, h2)


def quotient(a: float, b: float) -> float:
    """a / b, infinite where b is 0, which steps that `Method.check_steps` refuses may lead to."""
    return a / b if b else math.inf


def extrapolate(weights: tuple[float, float], x: Tensor, d_next: Tensor, d_after: Tensor) -> Tensor:
    """x less the increment a d_{n+1} - b d_{n+2} expected of the step that led to it."""
    a, b = weights
    return add(add(x, d_next, -a), d_after, b)
