"""A CuPy backend on CPU tensors whose kernels NVRTC compiles for a card, and whose PTX runs here."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from gpu_embed.backends._cupy import CupyBackend
from gpu_embed.backends._cupy.device import as_argument
from gpu_embed.backends._cupy.nvrtc import Kernel, compile_kernels, import_cupy
from gpu_embed.backends._plan.gather import Gather

from .launch import ARCHITECTURE, region
from .machine import Program
from .memory import GlobalMemory, Region


class PtxCupyBackend(CupyBackend):
    """`CupyBackend` with its launches run by `Program`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()  # by kernel, without its template arguments
        # Of which table an address among the arguments is.
        self._tables: dict[int, Region] = {}

    def unusable_reason(self, device: torch.device) -> str | None:
        if find_spec("cupy") is None:
            return "cupy is not installed"
        try:
            import_cupy().cuda.nvrtc.getVersion()
        except Exception as error:
            return f"cupy finds no NVRTC: {error}"
        return None if device.type == "cpu" else "PTX runs on CPU tensors alone"

    def _prepare_gather(self, weight: Tensor) -> Gather:
        gather = super()._prepare_gather(weight)
        table = region("the table", weight)

        def gather_from_table(*args: object) -> None:
            self._tables = {table.address: table}
            gather(*args)  # type: ignore[arg-type]
            self._tables = {}

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
        self.launches[kernel.expression.partition("<")[0]] += 1
        self._run(kernel, blocks, threads, args)

    def _run(
        self,
        kernel: Kernel,
        blocks: tuple[int, int],
        threads: tuple[int, int],
        args: tuple[Tensor | int | float | None, ...],
    ) -> None:
        regions = [
            region(f"argument {place}", arg)
            for place, arg in enumerate(args)
            if isinstance(arg, Tensor)
        ]
        regions += self._tables.values()
        values = [as_argument(arg) for arg in args]
        _program(kernel).run(blocks, threads, values, GlobalMemory(regions))

    def _capability(self, device: torch.device) -> tuple[int, int]:
        return divmod(ARCHITECTURE, 10)


@cache
def _program(kernel: Kernel) -> Program:
    compiled = compile_kernels(
        kernel.stem, (kernel.expression,), f"compute_{ARCHITECTURE}", ("-lineinfo",)
    )
    return Program(compiled.image.decode(), compiled.symbols[kernel.expression])
