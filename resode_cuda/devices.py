"""What the library asks of a CUDA device before it launches kernels there."""

from __future__ import annotations

import torch

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with asynchronous copies into shared memory; kernels are compiled from it on."""


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability, as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def processor_count(device: torch.device) -> int:
    """Number of multiprocessors."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def reason_against(kernels: str, device: torch.device) -> str | None:
    """Why kernels of this name can't run on a device; None if nothing about the device is in the way."""
    if device.type != "cuda":
        return f"{kernels} run on CUDA devices, got tensors on {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = capability_of(device)
    if capability < OLDEST_CAPABILITY:
        needs, got = (f"{major}.{minor}" for major, minor in (OLDEST_CAPABILITY, capability))
        return f'{kernels} need compute capability {needs}, got {got}; on this GPU backend="torch" computes all of it'
    return None


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured in this thread."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
