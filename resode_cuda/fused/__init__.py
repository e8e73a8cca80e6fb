"""Residual perceptrons whose whole depth is one op."""

from .op import backends, mlp_stack

__all__ = ["backends", "mlp_stack"]
