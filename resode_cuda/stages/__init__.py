"""Existing models: their layers become the steps of residual stacks, and nothing else of them changes."""

from .conversion import Conversion, Converted, conversion, convert, unconvert

__all__ = ["Conversion", "Converted", "conversion", "convert", "unconvert"]
