"""Residual perceptrons whose whole depth is one op.

op            `apply`, which modules call, and the ops' implementations; `registration` tells torch of them
signature     what the ops take and give, as structures; `network`: the layers;  `storage`: increments that are stored
selection     which backend computes; `timings`: what was measured of each; `requirements`: what kernels can't do
reference/    plain torch, the specification;  triton/  and  cuda  the kernels
driver        slabs of rows and ranges of steps, for both kernel backends;  `slabs`, `schedule`: what it needs
"""

from . import registration as registration
from .op import backends, mlp_stack

__all__ = ["backends", "mlp_stack"]
