"""A random training step in words: a value that can be printed, pasted into a test, and run again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from resode_cuda import Reverse
from resode_cuda.reverse import PRESETS

DTYPES = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "float32 in float64": (torch.float32, torch.float64),
    "bfloat16": (torch.bfloat16, None),
}
STEPS = ("equal", "number", "unequal")
LIPSCHITZ = 3.0
"""What a block's Lipschitz constant is taken to be before its gain."""
WORST, WORST_CORRECTED = 1e-5, 1e-10
"""The largest error of a gradient that a recipe's solver is to make; from two corrections on."""


@dataclass(frozen=True, repr=False)
class Recipe:
    """One training step of one network.

    Args:
        blocks: names of `BLOCKS`, in order of depth. A number in their place is another use of the block there.
        is_tame: the blocks' gains make the network contract, else its steps do.
        corrections, is_accelerated: of the reverse solver, where `reverse` names a predictor and no preset.
        is_measured: the stack has measured a pass already, and measures one step in turn where that costs something.
        seed: of weights, data and the blocks' random numbers.
    """

    blocks: tuple[str | int, ...] = ("mlp", "mlp", "mlp")
    scheme: str = "euler"
    gradient: str = "adjoint"
    reverse: str = "corrected"
    corrections: int = 0
    is_accelerated: bool = False
    anchors: int | tuple[int, ...] | None = None
    steps: str = "equal"
    is_tame: bool = True
    dtype: str = "float64"
    states: str = "rows"
    is_training: bool = True
    is_input_frozen: bool = False
    keeps_input: bool = False
    on_drift: str = "warn"
    arguments: str = "nothing"
    context: str = "plain"
    way: str = "backward"
    event: str = "nothing"
    is_measured: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        default = Recipe()
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = [f"{name}={value!r}" for name, value in given.items() if value != getattr(default, name)]
        return f"Recipe({', '.join(shown)})"

    @classmethod
    def of(cls, *features: str) -> Recipe:
        """The simplest recipe with these features, each "field=value"."""
        chosen: dict[str, Any] = dict(feature.split("=") for feature in features)
        if "block" in chosen:
            chosen["blocks"] = (chosen.pop("block"),) * 3
        words = {"False": False, "True": True, "None": None}
        for name, value in chosen.items():
            if isinstance(value, str):
                chosen[name] = int(value) if value.isdigit() else words.get(value, value)
        return cls(**chosen)

    @property
    def features(self) -> frozenset[str]:
        is_shared = "shares_body" in self.blocks or any(isinstance(block, int) for block in self.blocks)
        own = {f"{field.name}={getattr(self, field.name)}" for field in fields(self)}
        return frozenset(own | {f"is_shared={is_shared}"} | {f"block={block}" for block in self.blocks})

    @property
    def shape(self) -> tuple[int, ...]:
        return {"rows": (3, 6), "tokens": (3, 2, 6), "images": (3, 2, 2, 6)}[self.states]

    @property
    def input_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def stream_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype][1]

    @property
    def step_count(self) -> int:
        return len(self.blocks) - (self.scheme == "heun")

    @property
    def solver(self) -> Reverse:
        if self.reverse in PRESETS:
            return PRESETS[self.reverse]
        accelerate = self.is_accelerated and self.corrections >= 2
        return Reverse(self.reverse, corrections=self.corrections, accelerate=accelerate)

    @property
    def order(self) -> int:
        """The error of a point at which a product is taken, as a power of h times the Lipschitz constant."""
        return self.solver.corrections + (1 if self.solver.extrapolates else 2)

    @property
    def contraction(self) -> float:
        """h times the Lipschitz constant of a block, such that the solver's error is small enough."""
        if self.gradient != "adjoint" or self.anchors == 1:
            return 0.5
        worst = WORST_CORRECTED if self.solver.corrections >= 2 else WORST
        return min(0.3, (worst / (30 * self.step_count)) ** (1 / self.order))

    @property
    def has_gain(self) -> bool:
        """Whether the blocks' gains make the network contract; some blocks have none."""
        return self.is_tame and not {"itself", "writes_input"} & set(self.blocks)

    @property
    def gain(self) -> float:
        return self.contraction / LIPSCHITZ / max(self._relative_steps) if self.has_gain else 1.0

    @property
    def hs(self) -> tuple[float, ...]:
        """h of each step."""
        if self.has_gain:
            return self._relative_steps
        return tuple(self.contraction / LIPSCHITZ * h / max(self._relative_steps) for h in self._relative_steps)

    @property
    def step(self) -> float | tuple[float, ...] | None:
        """What the stack is given for h."""
        if self.steps == "unequal":
            return self.hs
        return None if self.steps == "equal" and self.has_gain else self.hs[0]

    @property
    def _relative_steps(self) -> tuple[float, ...]:
        count = self.step_count
        if self.steps == "unequal":
            return tuple((1 + 0.5 * (-1) ** n) / count for n in range(count))
        return (1 / count if self.steps == "equal" else 0.4,) * count

    @property
    def tolerance(self) -> float:
        """The relative error of a gradient that rounding and the solver may make."""
        if self.gradient != "adjoint":
            return 1e-12 if self.input_dtype == torch.float64 else 1e-6
        if self.dtype == "bfloat16" or self.context == "autocast":
            rounding = 5e-2
        else:
            rounding = 1e-4 if self.input_dtype == torch.float32 else 1e-10
        if self.anchors == 1:
            return rounding
        if self.solver.is_stored and self.input_dtype == torch.float32:
            rounding = max(rounding, 1e-3)  # companions are multiples of 2^-13 of a state
        return rounding + 300 * self.step_count * self.contraction**self.order

    @property
    def is_strided(self) -> bool:
        """Whether torch may choose kernels that round otherwise where no gradients are recorded."""
        return self.context == "strided_input" or bool({"transposed", "broadcast", "itself"} & set(self.blocks))

    @property
    def smallest(self) -> float:
        """The share of the largest gradient below which another one is rounding."""
        if self.dtype == "bfloat16" or self.context == "autocast":
            return 3e-2
        return 1e-6 if self.input_dtype == torch.float32 else 1e-13
