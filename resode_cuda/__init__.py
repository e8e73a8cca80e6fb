"""Training very deep residual networks without storing their activations."""

from importlib.metadata import version

from . import ops
from .calibration import Candidate, Plan, calibrate
from .drift import Drift, DriftError, DriftLogger
from .initialize import deepen, smooth_init_
from .ops import backends
from .reverse import Reverse
from .stack import ResidualStack

__version__ = version("resode_cuda")
__all__ = [
    "Candidate",
    "Drift",
    "DriftError",
    "DriftLogger",
    "Plan",
    "ResidualStack",
    "Reverse",
    "backends",
    "calibrate",
    "deepen",
    "ops",
    "smooth_init_",
]
