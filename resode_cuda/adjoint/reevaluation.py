"""Whether a block that ran again was the same function: two numbers of each increment, compared.

The forward pass keeps two projections of a sample of d_n on random signs, r_i . d_n; the backward pass takes them of
its own evaluation. If the two increments differ by e, so do the projections by r_i . e, whose mean square is |e|^2:
a sign, an adapter or random numbers that changed show whatever their direction. (|d_n|^2 does not see a sign, and
<d_n, x_n> is next to zero in many dimensions whatever happens.) Defects can't show any of it: the predictor and the
evaluation use the same wrong function.

A sample of a few thousand values spread over the state costs the same few microseconds for states of all sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import is_capturing
from ..method import Method
from ..schemes import Stages
from ..squares import square_dtype
from .coarseness import Rounding, finest_shares, first_coarse, percent

SAMPLE = 2**13
"""The most values of a state that are looked at."""
ROUNDING = 0.02
"""The relative change of an increment at the same state, by the rounding of 16-bit sums in another order, that is let
pass."""
UNEXPLAINED = 0.05
"""The relative change that is told of, beyond what the error of y explains."""
LARGE = 0.3
"""The relative change that is told of however it is explained.

Of 480 backward passes of networks that ran again as they first ran (MLP, convolution, attention; fresh and trained for
some steps; all solvers, h = 1/N and 1) 328 had defects below 0.05, or a solver that measures none. 35 of them were told
of; their gradients were off by 6.6% at least, by 85% in the median.
"""
STEEP = 2
"""How many times the rounding of its state a stored increment may change. On trained networks (GPT, ViT, convolutions
with group and batch norm, ConvNeXt's blocks; 1 to 8 bits) it was 1.3 at most."""
ALL = 1.0
"""The relative change of a stored increment that is told of however coarse the rounding."""

Numbers = Sequence[Sequence[float]]
"""Those of each step."""


class Increments:
    """Two numbers of each increment of a forward pass, and of its backward pass.

    They are those of f_n = k1 + k2, the increment d_n = w f_n over its weight, of which no weight is too small.

    Args:
        like: the state, whose dtype and device they have.
        method: of the stack.
        measured: the steps that are compared.
    """

    def __init__(self, like: Tensor, method: Method, measured: Collection[int]) -> None:
        self.measured = measured
        weights = method.step_weights
        self._sample = Sample(like)
        is_stored = method.solver.is_stored
        self.first = like.new_zeros(len(weights), 4 if is_stored else 2, dtype=self._sample.dtype)
        """In the forward pass: the projections and, where increments are stored, |x_{n+1} - c_{n+1}|^2 and what that
        would be if each value were off by a typical one of the states."""
        self._is_typical_known = False
        self._first_rows = self.first[:, :2].unbind(), self.first[:, 2:].unbind()
        self.again: Tensor | None = None
        """In the last backward pass, shape [steps, 4]: the projections, |f_n|^2 and |y - (x_{n+1} - w f_n)|^2."""
        self._again_rows: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] = (), (), ()
        resolution = torch.finfo(like.dtype).eps if method.scheme.has_state_inside else 0.0
        self.judge = Judge(weights, method.exactly_predicted, is_stored, finest_shares(method), resolution)
        self.slack = method.defect_slack
        self._blocks_per_step = method.scheme.blocks_per_step

    def record(self, n: int, stages: Stages) -> None:
        """Step n was evaluated in the forward pass."""
        if n not in self.measured:
            return
        self._sample.project(self._sample.increment(stages, n), self._first_rows[0][n])

    def record_rounding(self, n: int, x_next: Tensor, companion: Tensor) -> None:
        """Step n's increment was stored."""
        if not (n in self.measured or n + 1 in self.measured):
            return
        difference = self._sample.of(x_next, n).sub(self._sample.of(companion, n)).to(self.first.dtype)
        torch.dot(difference, difference, out=self._first_rows[1][n][0])
        if not self._is_typical_known and len(difference):
            self.first[:, 3] = _typical_square(self._sample.of(x_next, n).to(self.first.dtype))
            self._is_typical_known = True

    def begin(self) -> None:
        """A backward pass begins."""
        self.again = self.first.new_full((len(self.first), 4), torch.nan)
        self._again_rows = self.again[:, :2].unbind(), self.again[:, 2].unbind(), self.again[:, 3].unbind()

    def compare(self, n: int, stages: Stages, y: Tensor, x_next: Tensor) -> None:
        """Step n was evaluated again, at y."""
        if self.again is None:
            return
        projections, squares, errors = self._again_rows
        f = self._sample.increment(stages, n)
        self._sample.project(f, projections[n])
        difference = (
            self._sample.of(y, n).sub(self._sample.of(x_next, n)).to(f.dtype).add_(f, alpha=self.judge.weights[n])
        )
        torch.dot(f, f, out=squares[n])
        torch.dot(difference, difference, out=errors[n])

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """Those that a backward pass is judged by; none before one has begun."""
        return () if self.again is None else (self.first, self.again)

    def defect_square(self, n: int) -> Tensor:
        """|y - (x_{n+1} - w f_n)|^2 of the step that was compared last, estimated from the sample; shape []."""
        return self._again_rows[2][n] * self._sample.share_of_one

    @property
    def are_all_measured(self) -> bool:
        return len(self.measured) == len(self.first)

    def blocks_of(self, n: int) -> str:
        last = n + self._blocks_per_step - 1
        return f"block {n}" if last == n else f"blocks {n} to {last}"


class Sample:
    """At most `SAMPLE` values of states like this one, from all over it, and their projections on random signs."""

    def __init__(self, like: Tensor) -> None:
        self.dtype = square_dtype(like.device)
        self._shape = None if like.numel() <= SAMPLE else like.shape
        count = len(self.of(like, 0))
        self.share_of_one = like.numel() / max(1, count)
        """How many values of the state one of the sample stands for."""
        # What is made while a graph is captured has no values until it is replayed.
        self._signs = (_made_signs if is_capturing() else _signs)(count, self.dtype, like.device)

    def of(self, x: Tensor, n: int) -> Tensor:
        """Step n's sample, as a vector. Steps take turns in what they look at."""
        return (x if self._shape is None else x[_places(self._shape, n)]).reshape(-1)

    def increment(self, stages: Stages, n: int) -> Tensor:
        """That of f_n, an increment over its weight, which may be too small for the dtype."""
        k1, k2 = stages
        f = self.of(k1, n).to(self.dtype)
        return f if k2 is None else f + self.of(k2, n)

    def project(self, f: Tensor, out: Tensor) -> Tensor:
        """Write the two numbers of one increment, shape [2]."""
        return torch.mv(self._signs, f, out=out)


def _typical_square(values: Tensor) -> Tensor:
    """|x|^2 of a vector if all its values but zeros were as large as a typical one.

    The median: one value far above the others must not hide that these were rounded off. Of what is not zero: after a
    ReLU half of the values are.
    """
    magnitude = values.abs()
    is_zero = magnitude == 0
    typical = magnitude.masked_fill(is_zero, torch.nan).nanmedian()
    count = is_zero.logical_not().sum()
    return torch.where(count == 0, 0.0, typical * typical * count)


def changes(first: Numbers, again: Numbers) -> list[float]:
    """The relative change of each step's increment; NaN for a step that was not evaluated again."""
    return [_change(before, now) for before, now in zip(first, again, strict=True)]


def _change(first: Sequence[float], again: Sequence[float]) -> float:
    before, now = first[:2], again[:2]
    change = math.dist(before, now) / math.sqrt(2)
    scale = max(math.sqrt(again[2]), math.hypot(*before) / math.sqrt(2))
    return change / scale if change else change


class Judge(NamedTuple):
    """Tells a block that became another function from one that is seen from another point."""

    weights: Sequence[float]
    """w of each step."""
    exact: Collection[int]
    """The steps that are evaluated again at x_n itself, not at an approximation."""
    is_stored: bool
    """Whether the errors of the points are those of rounding, each step's own."""
    finest: Sequence[float] = ()
    """The share of each step's increment that its bits may round off, where increments are stored."""
    resolution: float = 0.0
    """The resolution of the dtype of states, where increments are differences of them; else 0."""

    def unexplained(self, first: Numbers, again: Numbers) -> tuple[int, float] | None:
        """The step whose change is furthest above what is let pass, and its change; None where all are let pass."""
        explained = self._rounded(first, again) if self.is_stored else self._rebuilt(again)
        most = ALL if self.is_stored else LARGE
        coarse = self._of_dtype(first, again)
        allowed = [
            ROUNDING if n in self.exact else math.inf if of_dtype > ALL else min(most, UNEXPLAINED + e + of_dtype)
            for n, (e, of_dtype) in enumerate(zip(explained, coarse, strict=True))
        ]
        found = enumerate(changes(first, again))
        above = [(change - allowed[n], n, change) for n, change in found if change > allowed[n]]
        return max(above)[1:] if above else None

    def coarse(self, first: Numbers, again: Numbers) -> tuple[int, float] | None:
        """As `first_coarse`. What was rounded is the increment and what the step before left, as if independent."""
        roundings, before = [], 0.0
        for n in range(len(self.finest)):
            off, d = math.sqrt(first[n][2]), self.weights[n] * math.sqrt(again[n][2])
            roundings.append(Rounding(off, math.hypot(d, before), math.sqrt(first[n][3])))
            before = off
        return first_coarse(roundings, self.finest)

    def _of_dtype(self, first: Numbers, again: Numbers) -> list[float]:
        """What of each change the rounding of states to their dtype explains: at another point it is another."""
        if not (self.resolution and self.is_stored):
            return [0.0] * len(again)
        squares = [max(now[2], (before[0] ** 2 + before[1] ** 2) / 2) for before, now in zip(first, again, strict=True)]
        moved = (w * math.sqrt(square) for w, square in zip(self.weights, squares, strict=True))
        sizes = (self.resolution * math.sqrt(numbers[3]) for numbers in first)
        return [size / d if d else math.inf if size else 0.0 for size, d in zip(sizes, moved, strict=True)]

    def _rebuilt(self, again: Numbers) -> list[float]:
        """What of each change the errors of the points y explain.

        An error of y changes the increment by the step's Jacobian J times it, and shows in y - (x_{n+1} - d_n) as 1 + J
        times it: with |J| below 1/2, where rebuilding converges, the former is at most the latter. Errors of later
        steps add up, up to a state that is known exactly.
        """
        found, error = [0.0] * len(again), 0.0
        for n in reversed(range(len(again))):
            f, defect = math.sqrt(again[n][2]), math.sqrt(again[n][3])
            if n in self.exact:
                error = 0.0
                continue
            error += defect if math.isfinite(defect) else 0.0
            d = self.weights[n] * f
            found[n] = error / d if d else math.inf
        return found

    def _rounded(self, first: Numbers, again: Numbers) -> list[float]:
        """The same where increments are stored: the error of y is that of the step before."""
        before = [0.0, *(math.sqrt(numbers[2]) for numbers in first[:-1])]
        moved = (w * math.sqrt(numbers[2]) for w, numbers in zip(self.weights, again, strict=True))
        return [STEEP * error / d if d else math.inf for error, d in zip(before, moved, strict=True)]


CAUSES = (
    "usual causes: an adapter, a cache or a counter was switched, grown or cleared meanwhile, random numbers come from "
    "a generator of the block's own or under torch.random.fork_rng, or a tensor was changed through .data; pass such "
    'things as arguments of the stack, leave them alone until the backward pass has ended, or use gradient="backprop"'
)


def changed_in_between(change: float) -> str:
    """What is told of blocks whose increment changed that much between forward and backward pass."""
    return (
        f"changed its increment by {percent(change)} between forward and backward pass, more than the error of the "
        "reconstruction explains, and the gradient is as far off: it is another function by now, or it is so steep "
        f"that another state was rebuilt, which resode_cuda.calibrate helps; {CAUSES}"
    )


def not_recomputed(change: float) -> str:
    """What is told of a block that was recomputed at the same state."""
    return (
        f"changed its increment by {percent(change)} between forward and backward pass, at the same state, and the "
        f"gradient is as far off: it is another function by now; {CAUSES}"
    )


@lru_cache(maxsize=1024)
def _places(shape: torch.Size, n: int) -> tuple[slice, ...]:
    """The entries of each dimension that step n samples, as many at every step."""
    return tuple(
        slice(n % stride, n % stride + stride * (size // stride), stride) if stride > 1 else slice(None)
        for size, stride in zip(shape, _strides(shape), strict=True)
    )


def _strides(shape: torch.Size) -> list[int]:
    """The distance of sampled entries in each dimension: the first dimensions are thinned out first."""
    excess, strides = math.prod(shape) / SAMPLE, []
    for size in shape:
        stride = max(1, min(math.ceil(excess), size // min(size, 4) if size else 1))
        strides.append(stride)
        excess /= size / max(1, size // stride) if size else 1
    if excess > 1 and strides:
        strides[-1] = min(max(1, shape[-1]), max(strides[-1], math.ceil(strides[-1] * excess)))
    return strides


def _made_signs(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two rows of random signs, the same at any time, from no generator that a program could share."""
    bits = torch.arange(1, 2 * count + 1, device=device)
    for factor, shift in ((-7046029254386353131, 29), (-4658895280553007687, 32)):
        bits = bits * factor
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits >> 40 & 1)).to(dtype).view(2, count)


_signs = lru_cache(maxsize=64)(_made_signs)
