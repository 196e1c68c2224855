"""Runs the cases in the interpreter, and a rival's kernels on the same ids."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import torch

from .. import machine
from ..ptx.counts import LaunchCounts, counting
from ..ptx.launch import PtxBackend, running_ptx
from .cases import CountedCase, ideals
from .table import OWN, Row, make_row

LIGER = "liger_kernel.ops.experimental.embedding"
LIGER_PACKAGE = "liger-kernel"
# Its gradient is by atomics.
LIGER_OPERATIONS = ("embedding", "atomic")


def own_rows(case: CountedCase) -> Iterator[Row]:
    """One for each kernel, in the order of their first launches."""
    with counting() as launches:
        case.call(PtxBackend())
    by_kernel: dict[str, list[LaunchCounts]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    known = ideals(case)
    for kernel, own in by_kernel.items():
        ideal = next((known[stem] for stem in known if kernel.startswith(stem)), None)
        yield make_row(OWN, str(case), own, ideal)


def has_liger() -> bool:
    return importlib.util.find_spec(LIGER.partition(".")[0]) is not None


def liger_rows(case: CountedCase) -> Iterator[Row]:
    """No row where it has no such operation."""
    if case.operation not in LIGER_OPERATIONS:
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
    yield make_row(f"{LIGER_PACKAGE} {machine.version(LIGER_PACKAGE)}", str(case), launches, ideal)
