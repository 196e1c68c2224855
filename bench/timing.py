"""Clocks: milliseconds of a call on its device, and the host's microseconds per call."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A sample on the CPU lasts at least this long, so that the clock's own time does not count.
SAMPLE_SECONDS = 2e-4
# A call that waits for the device within itself looks like a slow launch; no spin hides that.
LONGEST_SPIN = 2e-3


@dataclass(frozen=True)
class Call:
    """What is timed. run(i) uses the i-th of the rotated inputs; before(i) prepares it, untimed."""

    run: Callable[[int], object]
    before: Callable[[int], object] | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 0.5  # for each of warm and cold
    min_samples: int = 5
    max_samples: int = 200
    cold: bool = True
    host_seconds: float = 0.2  # for the host's time per call; 0: not measured


class Percentiles(NamedTuple):
    """Of milliseconds."""

    p20: float
    p50: float
    p80: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    """The 20th, 50th and 80th percentile, between neighbours where none is exact."""
    return Percentiles(*np.percentile(samples, (20, 50, 80)).tolist())


def time_calls(
    calls: Sequence[Call], device: torch.device, effort: Effort, cold: bool = False
) -> list[Percentiles]:
    """Milliseconds of each call, in turns, so that a slow moment of the machine slows all alike.

    Args:
        cold: before each call a buffer larger than the last cache is written.
    """
    with no_garbage_collection():
        if device.type == "cuda":
            samples = _cuda_samples(calls, device, effort, cold)
        else:
            samples = _cpu_samples(calls, effort, cold)
    return [percentiles(values) for values in samples]


def _cpu_samples(calls: Sequence[Call], effort: Effort, cold: bool) -> list[list[float]]:
    once = [_seconds_of(call) for call in calls]
    # After a flush the second call would find the caches warm again.
    repeats = [1 if cold else max(1, math.ceil(SAMPLE_SECONDS / seconds)) for seconds in once]
    if cold:
        flush_seconds = _seconds_of(Call(lambda i: flush(torch.device("cpu"))))
        once = [seconds + flush_seconds for seconds in once]
    longest = max(a * b for a, b in zip(once, repeats, strict=True))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(_num_samples(longest, effort)):
        for k in _order(len(calls), turn):
            # Two apart: no call finds in the caches what another has just read.
            first = turn + 2 * k
            if cold:
                flush(torch.device("cpu"))
            start = time.perf_counter()
            for i in range(first, first + repeats[k]):
                calls[k].run(i)
            samples[k].append((time.perf_counter() - start) / repeats[k] * 1e3)
    return samples


def _order(num_calls: int, turn: int) -> Sequence[int]:
    """There and back: nobody is always the first."""
    return range(num_calls) if turn % 2 else range(num_calls - 1, -1, -1)


def _cuda_samples(
    calls: Sequence[Call], device: torch.device, effort: Effort, cold: bool
) -> list[list[float]]:
    """By events on the device.

    Before each pair of events the device spins for longer than the host needs to launch the call, so that the
    events see the kernels alone and not the host between them: the host's time is measured on its own.
    """
    launch = max(_launch_seconds(call, device) for call in calls)
    # clock64 ticks at up to about 2 GHz.
    spin = int(2e9 * min(2 * launch + 20e-6, LONGEST_SPIN))
    longest = max(_seconds_of(call, device) for call in calls)
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for turn in range(_num_samples(longest + launch, effort)):
        for k in _order(len(calls), turn):
            before, i = calls[k].before, turn + 2 * k
            if before is not None:
                before(i)
            if cold:
                flush(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(spin)
            start.record()
            calls[k].run(i)
            end.record()
            pairs[k].append((start, end))
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) for start, end in events] for events in pairs]


def _seconds_of(call: Call, device: torch.device | None = None) -> float:
    """The shorter of two calls with their wait: an estimate; also the warm-up."""
    seconds = []
    for i in range(2):
        if call.before is not None:
            call.before(i)
        seconds.append(_clocked(call, i, device, whole=True))
    return max(min(seconds), 1e-7)


def _launch_seconds(call: Call, device: torch.device) -> float:
    """What the host needs for one call, without the wait."""
    seconds = min(_clocked(call, i, device, whole=False) for i in range(3))
    _wait(device)
    return seconds


def _clocked(call: Call, i: int, device: torch.device | None, whole: bool) -> float:
    """Seconds of a call on a device that waits for it; with the device's own if it is the whole."""
    _wait(device)
    start = time.perf_counter()
    call.run(i)
    if whole:
        _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_samples(seconds: float, effort: Effort) -> int:
    wanted = int(effort.seconds / max(seconds, 1e-7))
    return min(max(wanted, effort.min_samples), effort.max_samples)


def host_us(calls: Sequence[Call], device: torch.device, seconds: float = 0.2) -> list[float]:
    """The host's own time per call, in microseconds: give it inputs so small that nothing else counts.

    On CUDA the host launches a chunk of calls and waits between the chunks alone; on the CPU the little work is
    part of the time. The calls take turns. The 20th percentile: a chunk in which the system gave the
    processor to somebody else says nothing about the call.
    """
    samples: list[list[float]] = [[] for _ in calls]
    smallest = 10 if device.type == "cuda" else 1
    with no_garbage_collection():
        chunks = []
        for call in calls:
            for i in range(10):
                call.run(i)
            once = min(_launch_seconds(call, device) for _ in range(3))
            chunks.append(max(smallest, math.ceil(SAMPLE_SECONDS / 2 / once)))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[0]) < 5:
            for call, chunk, values in zip(calls, chunks, samples, strict=True):
                _wait(device)
                start = time.perf_counter()
                for i in range(chunk):
                    call.run(i)
                values.append((time.perf_counter() - start) / chunk * 1e6)
    _wait(device)
    return [percentiles(values).p20 for values in samples]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running in the middle of a sample."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def flush(device: torch.device) -> None:
    """Write a buffer larger than the last cache."""
    _flush_buffer(device).add_(1)


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    size = 2 * last_cache_bytes()
    if device.type == "cuda":
        size = max(256 * 2**20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.ones(size // 4, dtype=torch.int32, device=device)


def last_cache_bytes() -> int:
    """The size of the CPU's last cache; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    # A cache that many virtual machines share is not all ours.
    return min(max(sizes, default=32 * 2**20), 128 * 2**20)


def copy_gbps(device: torch.device, max_bytes: int | None = None) -> float:
    """Measured bandwidth of a large copy, bytes read plus bytes written, in GB/s."""
    size = 2**30 if device.type == "cuda" else 2**27
    size = size if max_bytes is None else min(size, max_bytes // 4)
    source = torch.ones(max(size // 4, 2**16), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    effort = Effort(seconds=0.5, min_samples=8, max_samples=50)
    (times,) = time_calls([Call(lambda i: target.copy_(source))], device, effort)
    return 2 * source.nbytes / times.p50 / 1e6
