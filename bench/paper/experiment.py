"""What `python -m bench.paper` asks of an experiment, and which experiments there are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:  # so that --help comes at once
    from ..harness.tables import Target
    from .lab import Lab
    from .options import Options

Figures = dict[str, Any]
"""Everything that an experiment measured, as its JSON keeps it."""


class Experiment(Protocol):
    """A module of `bench.paper.experiments` with these names."""

    TITLE: str
    MUST_SHOW: str
    """What the picture must show, in a sentence or two."""

    def settings(self, options: Options) -> Any:
        """A dataclass of all that the figures depend on; they are not measured again while it stays the same."""

    def measure(self, settings: Any, lab: Lab) -> Figures:
        """Measure everything, in jobs of the laboratory, so that a run that is stopped can go on."""

    def checks(self, figures: Figures) -> list[Target]:
        """What the figures are held against."""

    def notes(self, figures: Figures) -> list[str]:
        """What else a reader should know of these figures, a sentence each."""

    def draw(self, figures: Figures, path: Path) -> None:
        """Write the picture."""


EXPERIMENTS = {
    "linear_weights": "gradient descent keeps the weights of a linear net smooth in depth",
    "gradient_error": "a net trained at depth 32, resampled to others",
    "reconstruction": "how well the input is rebuilt from the output, weights smooth, alternating, independent",
    "depth_sweep": "test error against depth by backprop and by the adjoint, Euler and Heun; the longest",
    "untie": "a tied net, untied, one stage fine-tuned by the adjoint",
    "ordinary_network": "where the adjoint fails (h = 1), and what trains there",
    "memory": "flat against linear in depth",
    "stored_bits": "how many stored bits trained nets need, against depth",
    "smooth_gradients": "weights that smoothed gradients keep smooth in depth",
}
"""What each measures, by the name of its module, in the order in which they run."""


def load(name: str) -> Experiment:
    return cast(Experiment, importlib.import_module(f"{__package__}.experiments.{name}"))
