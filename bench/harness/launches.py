"""How many kernels a call launches on a GPU, from torch's profiler; copies and fills by the driver are not counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NO_KERNELS = ("Memcpy", "Memset", "Context Sync", "Stream Sync", "Event Sync")


def count(call: Callable[[], object], device: torch.device) -> int:
    """Take a call before, so that what is compiled or tuned once is."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize(device)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    return sum(event.device_type() == DeviceType.CUDA and not event.name().startswith(_NO_KERNELS) for event in events)
