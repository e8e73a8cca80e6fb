"""The norms of a layer's input, without weights of their own: those would be absorbed by W1 and b1.

rms:    u = x r,          r = 1 / sqrt(mean(x^2) + EPSILON)
layer:  u = (x - m) r,    r = 1 / sqrt(mean((x - m)^2) + EPSILON),   m = mean(x)

Means are over the last dimension. The vector-Jacobian product needs u and r alone: with the cotangent c of u it is
r (c - u mean(c u)) for rms, and for layer r (c - mean(c) - u mean(c u)).
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = (None, "rms", "layer")
EPSILON = 1e-5


def normalize(norm: str | None, x: Tensor, out: Tensor) -> Tensor | None:
    """u into `out`, which may have a narrower dtype than x. Returns r, shape [rows, 1]; None without a norm."""
    if norm is None:
        out.copy_(x)
        return None
    centered = x if norm == "rms" else x - x.mean(-1, keepdim=True)
    r = centered.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
    torch.mul(centered, r, out=out) if out.dtype == x.dtype else out.copy_(centered * r)
    return r


def norm_vjp(norm: str, u: Tensor, r: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent of x from that of u, in r's dtype. The cotangent may be overwritten."""
    cotangent = cotangent.to(r.dtype)
    along = (cotangent * u).mean(-1, keepdim=True)
    if norm == "layer":
        cotangent = cotangent.sub_(cotangent.mean(-1, keepdim=True))
    return cotangent.addcmul_(u.to(r.dtype), along, value=-1).mul_(r)
