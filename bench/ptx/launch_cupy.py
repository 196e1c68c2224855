"""A CuPy backend on CPU tensors whose kernels NVRTC compiles for a card, and whose PTX runs here."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_embed.backends._cupy import CupyBackend
from gpu_embed.backends._cupy.nvrtc import Kernel, compile_kernels, import_cupy, source
from gpu_embed.backends._plan.gather import Gather
from gpu_embed.shard import Shard

from .fresh import watches_memory
from .launch import ARCHITECTURE, region
from .machine import Program
from .memory import GlobalMemory


@watches_memory
class PtxCupyBackend(CupyBackend):
    """`CupyBackend` with its launches run by `Program`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()  # by kernel, without its template arguments
        # The table that a lookup has the address of.
        self._table: Tensor | None = None

    def unusable_reason(self, device: torch.device) -> str | None:
        if find_spec("cupy") is None:
            return "cupy is not installed"
        try:
            import_cupy().cuda.nvrtc.getVersion()
        except Exception as error:
            return f"cupy finds no NVRTC: {error}"
        return None if device.type == "cpu" else "PTX runs on CPU tensors alone"

    def _prepare_gather(self, weight: Tensor, shard: Shard | None) -> Gather:
        gather = super()._prepare_gather(weight, shard)

        def gather_from_table(*args: Any) -> None:
            self._table = weight
            try:
                gather(*args)
            finally:
                self._table = None

        return gather_from_table

    def _launch(
        self,
        kernel: Kernel,
        blocks: tuple[int, int],
        threads: tuple[int, int],
        device: torch.device,
        *args: Tensor | int | float | None,
    ) -> None:
        if 0 in blocks:
            return
        names = parameter_names(kernel)
        self.launches[function_name(kernel)] += 1
        arguments: dict[str, Any] = dict(zip(names, args, strict=True))
        if self._table is not None:
            arguments["weight_ptr"] = self._table
        self._run(kernel, blocks, arguments, threads)

    def _run(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        threads: tuple[int, ...],
    ) -> None:
        regions, values = [], []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                regions.append(region(name, value))
                value = value.data_ptr()
            values.append(value or 0)
        _program(kernel).run(grid, threads, values, GlobalMemory(regions))

    def _capability(self, device: torch.device) -> tuple[int, int]:
        return divmod(ARCHITECTURE, 10)


def function_name(kernel: Kernel) -> str:
    return kernel.expression.partition("<")[0]


@cache
def parameter_names(kernel: Kernel) -> tuple[str, ...]:
    """As the source has them: PTX numbers them."""
    code = re.sub(r"//[^\n]*", "", source(kernel.stem))
    head = re.search(rf"__global__ void {function_name(kernel)}\(([^)]*)\)", code)
    assert head is not None, kernel
    return tuple(re.findall(r"(\w+)\s*(?:,|$)", head[1]))


@cache
def _program(kernel: Kernel) -> Program:
    compiled = compile_kernels(
        kernel.stem, (kernel.expression,), f"compute_{ARCHITECTURE}", ("-lineinfo",)
    )
    return Program(compiled.image.decode(), compiled.symbols[kernel.expression])
