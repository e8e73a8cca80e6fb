"""Training very deep residual networks without storing their activations."""

from . import functional, ops
from .adjoint.drift import Drift, DriftError
from .adjoint.drift_log import DriftLogger
from .available import backends
from .calibration import calibrate
from .initialize import deepen, smooth_init_
from .mlp import ResidualMLP
from .plan import Candidate, Plan
from .reverse import Reverse
from .smoothness import smooth_gradients_
from .stack import ResidualStack

__version__ = "0.1.0"
__all__ = [
    "Candidate",
    "Drift",
    "DriftError",
    "DriftLogger",
    "Plan",
    "ResidualMLP",
    "ResidualStack",
    "Reverse",
    "backends",
    "calibrate",
    "deepen",
    "functional",
    "ops",
    "smooth_gradients_",
    "smooth_init_",
]
