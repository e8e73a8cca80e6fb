"""Training very deep residual networks without storing their activations."""

from . import functional, ops
from .adjoint.drift import Drift, DriftError
from .adjoint.drift_log import DriftLogger
from .available import backends
from .calibration import calibrate
from .diagnosis import Diagnosis, diagnose
from .initialize import deepen, smooth_init_
from .mlp import ResidualMLP
from .plan import Candidate, Plan
from .resuming import load_training_state, training_state
from .reverse import Reverse
from .smoothness import roughness, smooth_gradients_
from .stack import ResidualStack
from .stages import Conversion, conversion, convert, deepen_stage, tie_stage, unconvert, untie_stage

__version__ = "0.1.0"
__all__ = [
    "Candidate",
    "Conversion",
    "Diagnosis",
    "Drift",
    "DriftError",
    "DriftLogger",
    "Plan",
    "ResidualMLP",
    "ResidualStack",
    "Reverse",
    "backends",
    "calibrate",
    "conversion",
    "convert",
    "deepen",
    "deepen_stage",
    "diagnose",
    "functional",
    "load_training_state",
    "ops",
    "roughness",
    "smooth_gradients_",
    "smooth_init_",
    "tie_stage",
    "training_state",
    "unconvert",
    "untie_stage",
]
