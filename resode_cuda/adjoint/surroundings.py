"""The state of the program around a block that its evaluation depends on, beside random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.backends import mha
from torch.nn.utils import parametrize

from .restoration import Slot, put, undo_later

_WITH_FAST_PATH = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder


class Autocast(NamedTuple):
    """The autocast state of a type of device."""

    device_type: str
    is_enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def set(self) -> None:
        torch.set_autocast_enabled(self.device_type, self.is_enabled)
        torch.set_autocast_dtype(self.device_type, self.dtype)


class Surroundings(NamedTuple):
    """Autocast states, torch's default dtype, and whether its algorithms must be deterministic."""

    autocast: tuple[Autocast, ...]
    default_dtype: torch.dtype
    determinism: tuple[bool, bool]

    @classmethod
    def now(cls, device_type: str) -> Surroundings:
        """Those of states on a type of device, and of the CPU."""
        autocast = [Autocast.now("cpu")]
        if device_type not in ("cpu", "meta"):
            autocast.append(Autocast.now(device_type))
        determinism = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        return cls(tuple(autocast), torch.get_default_dtype(), determinism)

    def replay(self) -> None:
        """Make them what they were, until the `restoring` around this ends."""
        now = Surroundings.now(self.autocast[-1].device_type)
        if now != self:
            undo_later(now._set)
            self._set()

    def _set(self) -> None:
        for autocast in self.autocast:
            autocast.set()
        torch.set_default_dtype(self.default_dtype)
        mode, warn_only = self.determinism
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def turn_caches_off() -> None:
    """Neither autocast nor `parametrize.cached` hands a tensor made without gradients to a later use that needs them,
    nor a tensor with another graph to this one, until the `restoring` around this ends."""
    undo_later(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)
    if parametrize._cache_enabled:
        put([Slot(vars(parametrize), "_cache_enabled")], [0])


def has_fast_path(modules: Iterable[nn.Module]) -> bool:
    """Whether torch may compute these modules by other kernels where no gradient is asked for."""
    return any(isinstance(module, _WITH_FAST_PATH) for module in modules)


def turn_fast_path_off() -> None:
    """torch's attention is the function that has gradients, until the `restoring` around this ends."""
    if mha.get_fastpath_enabled():
        undo_later(mha.set_fastpath_enabled, True)
        mha.set_fastpath_enabled(False)
