"""Runs the cases in the interpreter, and a rival's kernels on the same ids."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import torch

from gpu_embed.backends._cupy.nvrtc import import_cupy

from .. import machine
from ..ptx.counts import LaunchCounts, counting
from ..ptx.launch import PtxBackend, running_ptx
from ..ptx.launch_cupy import PtxCupyBackend
from .cases import CPU, CountedCase, ideals
from .table import CUPY, TRITON, Row, make_row

LIGER = "liger_kernel.ops.experimental.embedding"
LIGER_PACKAGE = "liger-kernel"
# Its gradient is by atomics.
LIGER_OPERATIONS = ("embedding", "atomic")


def own_rows(case: CountedCase) -> Iterator[Row]:
    """One for each kernel, Triton's and then CUDA C++'s, in the order of their first launches."""
    known = ideals(case)
    backends: dict[str, Any] = {TRITON: PtxBackend(), CUPY: PtxCupyBackend()}
    for provider, backend in backends.items():
        with counting() as launches:
            case.call(backend)
        by_kernel: dict[str, list[LaunchCounts]] = {}
        for launch in launches:
            by_kernel.setdefault(kernel_name(launch.kernel), []).append(launch)
        for kernel, own in by_kernel.items():
            ideal = next((known[stem] for stem in known if kernel.startswith(stem)), None)
            yield make_row(kernel, provider, str(case), own, ideal, compiler(provider))


def kernel_name(symbol: str) -> str:
    """Without what a C++ compiler adds: its length before it, its template arguments behind it."""
    mangled = re.match(r"_Z(\d+)", symbol)
    return symbol[mangled.end() :][: int(mangled[1])] if mangled else symbol


def compiler(provider: str) -> str:
    """Of a provider's kernels, with its version."""
    if provider == CUPY:
        return "nvrtc " + ".".join(map(str, import_cupy().cuda.nvrtc.getVersion()))
    return f"triton {machine.version('triton')}"


def no_nvrtc() -> str | None:
    """Why no CUDA C++ can be compiled here; None: it can."""
    return PtxCupyBackend().unusable_reason(CPU)


def has_liger() -> bool:
    return importlib.util.find_spec(LIGER.partition(".")[0]) is not None


def liger_has(case: CountedCase) -> bool:
    """It adds to no gradient that exists, and knows no shards."""
    return case.operation in LIGER_OPERATIONS and not case.into and case.first_row is None


def liger_rows(case: CountedCase) -> Iterator[Row]:
    """No row where it has no such operation."""
    if not liger_has(case):
        return
    apply = importlib.import_module(LIGER).LigerEmbeddingFunction.apply
    weight = case.weight().requires_grad_(case.operation == "atomic")
    with running_ptx():
        with counting() as forward:
            output = apply(weight, case.ids())
        with counting() as backward:
            if weight.requires_grad:
                output.backward(torch.ones_like(output))
    launches = backward if weight.requires_grad else forward
    (ideal,) = ideals(case).values()
    liger = f"{LIGER_PACKAGE} {machine.version(LIGER_PACKAGE)}"
    yield make_row(launches[0].kernel, liger, str(case), launches, ideal, compiler(liger))
