"""The dtypes of states and of what is added to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of residual streams, blocks' outputs and parameters."""


def fits(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether values of the first dtype may be added to a stream of the second."""
    return narrow == wide or (narrow in DTYPES and narrow.itemsize < wide.itemsize)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as errors show it: "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(map(dtype_name, dtypes))
