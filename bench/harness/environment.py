"""Machine, software and settings of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import resode_cuda


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        # Above the number of threads in use, other work was slowing the measurements.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _triton(),
        "resode_cuda": resode_cuda.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def one_line(environment: dict[str, Any]) -> str:
    return (
        f"{environment['device']}, {environment['cpu_cores']} CPU cores, {environment['torch_threads']} threads, torch "
        f"{environment['torch']}, Python {environment['python']}, {environment['date'][:10]}"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return printed.stdout.splitlines()[0].strip() if printed.returncode == 0 and printed.stdout else None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if model:
            return model[1]
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with "-dirty" where the working tree differs from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() if described.returncode == 0 else None
