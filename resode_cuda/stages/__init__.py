"""Existing models: their layers become the steps of residual stacks, and nothing else of them changes."""

from .conversion import Conversion, Converted, conversion, convert, unconvert
from .depth import deepen_stage, tie_stage, untie_stage

__all__ = [
    "Conversion",
    "Converted",
    "conversion",
    "convert",
    "deepen_stage",
    "tie_stage",
    "unconvert",
    "untie_stage",
]
