"""Compiles what a candidate would launch, for a card that need not be here, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from .. import backends
from .subject import Launch, Subject
from .trials import timed_inputs

META = torch.device("meta")


class Job(NamedTuple):
    """One candidate of one kernel."""

    backend: str
    path: str  # of its settings
    settings: Any


class Usage(NamedTuple):
    """What a candidate's kernels need, at most."""

    registers: int = 0  # a thread's
    spilled_bytes: int = 0  # a thread's stack and local memory
    error: str = ""  # why it does not compile


class OfflineDriver:
    """All that Triton asks of a driver before it has compiled: for which card."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_device(self) -> int:
        # Triton keeps the binaries of each device apart.
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)


def compile_all(
    jobs: Iterable[Job], architecture: int, processes: int
) -> Iterator[tuple[Job, Usage]]:
    """Each job and what it needs, in the order in which they finish. The compilers' caches keep the binaries."""
    # A process that was forked from one with CUDA, or with Triton's interpreter, could not compile.
    with ProcessPoolExecutor(processes, get_context("spawn"), _start) as pool:
        futures = {pool.submit(_usage, job, architecture): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _usage(job: Job, architecture: int) -> Usage:
    try:
        usages = [resources(cubin) for cubin in _cubins(job, architecture)]
    except Exception as error:  # whatever a compiler raises
        return Usage(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return Usage(*(max(values) for values in zip(*usages, strict=True)))


def _cubins(job: Job, architecture: int) -> Iterator[bytes]:
    """What the job's kernel compiles to, for each of its timed inputs."""
    backend: Any = backends.load(job.backend)
    # CUDA C++ adds other vectors on newer cards.
    backend._capability = lambda device: divmod(architecture, 10)
    subject = Subject(backend, META)
    compiled = _triton_cubin if job.backend == "triton" else _cupy_cubin
    with subject.with_launch(job.path, job.settings):
        for given in timed_inputs(job.backend, job.path):
            for launch in subject.run(job.path, given, dry=True).launches:
                yield compiled(launch, architecture)


def _triton_cubin(launch: Launch, architecture: int) -> bytes:
    from triton.runtime import driver

    from ..backends._triton.device import ENABLE_FP_FUSION

    driver.set_active(OfflineDriver(architecture))
    kernel, grid, _, *args = launch.args
    settings = {"enable_fp_fusion": ENABLE_FP_FUSION, **launch.settings}
    found: bytes = kernel.warmup(*args, grid=grid, **settings).asm["cubin"]
    return found


def _cupy_cubin(launch: Launch, architecture: int) -> bytes:
    from ..backends._cupy.nvrtc import compile_kernels

    kernel, *_ = launch.args
    return compile_kernels(kernel.stem, (kernel.expression,), f"sm_{architecture}").image


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread, by the disassembler that Triton brings; 0 without it."""
    if find_spec("triton") is None:
        return 0, 0
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", printed)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
