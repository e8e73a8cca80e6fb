"""Training very deep residual networks without storing their activations."""

from importlib.metadata import version

from . import ops
from .drift import Drift
from .reverse import Reverse
from .stack import ResidualStack

__version__ = version("resode_cuda")
__all__ = ["Drift", "ResidualStack", "Reverse", "ops"]
