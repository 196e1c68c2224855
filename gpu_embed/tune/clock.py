"""Time on a card, as events on its stream tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

import torch

Call = Callable[[], object]
# The cache is flushed by writing at least this much; it also keeps the card busy while the host makes the launch.
FLUSH_BYTES = 256 * 2**20
COPY_BYTES = 2**30


class Clock(Protocol):
    """What the tuner asks of time."""

    def times(self, calls: Sequence[Call], cold: bool, repeats: int) -> list[float]:
        """The median time of each call in seconds, in turns; cold: with nothing of it in the cache."""

    def copy_gb_per_s(self) -> float:
        """Gigabytes a second that a copy reads and writes."""


class CudaClock:
    """The `Clock` of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(FLUSH_BYTES, 4 * cache_bytes)
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def times(self, calls: Sequence[Call], cold: bool, repeats: int) -> list[float]:
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        with torch.cuda.device(self._device):
            for call in calls:
                call()
            for _ in range(repeats):
                for call, measured in zip(calls, pairs, strict=True):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self._flushed.zero_()
                    if not cold:
                        call()
                    begin.record()
                    call()
                    end.record()
                    measured.append((begin, end))
            torch.cuda.synchronize()
        return [
            median(begin.elapsed_time(end) for begin, end in measured) / 1e3 for measured in pairs
        ]

    def copy_gb_per_s(self) -> float:
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        (seconds,) = self.times([lambda: target.copy_(source)], cold=True, repeats=10)
        return 2 * COPY_BYTES / seconds / 1e9
