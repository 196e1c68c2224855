"""The memory that a training step or another call takes at its peak."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "gpu_embed: the measured step"


def peak_of_step(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Bytes at the peak of a step that are not there before `build`, which makes the step, or hands it out.

    The optimizer's state is among them: it is made in a step before. On CUDA torch's allocator knows, on the CPU its
    profiler, which sees what torch's operators allocate.
    """
    return _cuda_peak(build, device) if device.type == "cuda" else _cpu_peak(build)


def _cuda_peak(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    step = build()
    step()
    return torch.cuda.memory_allocated(device) - before + cuda_peak(step, device)


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of a call that are not there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(build: Callable[[], Callable[[], object]]) -> int:
    with (
        _quiet_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen,
    ):
        step = build()
        step()
        with record_function(MEASURED):
            step()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == MEASURED)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = sum(change for moment, change in changes if moment < start)
    peak = now
    for moment, change in changes:
        if moment >= start:
            now += change
            peak = max(peak, now)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler announces itself there, past Python."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
