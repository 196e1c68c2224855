"""Compiles the Triton kernels for cards that are not here, and reads what came out.

What is compiled is what `TritonBackend` would have launched: it runs on tensors without data, and Triton's
own launch path specialises the arguments. So a changed launch table changes what is compiled here. No GPU is
needed: Triton's wheel brings the assembler and the disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu_embed.backends._triton import TritonBackend
from gpu_embed.backends._triton.device import ENABLE_FP_FUSION
from gpu_embed.tune.offline import OfflineDriver, resources

from .cases import Case
from .instructions import (
    INSTRUCTION_BYTES,
    Instruction,
    MachineCode,
    machine_code,
    read_machine_code,
    read_ptx,
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture, as one launch of one case specialises it."""

    kernel: str
    case: str
    architecture: int  # compute capability times ten
    binary: str  # the same for launches that share one
    settings: dict[str, Any]  # the launch's constants
    num_warps: int
    registers: int  # a thread's
    spilled_bytes: int  # a thread's stack and local memory
    shared_bytes: int  # a block's
    instructions: list[Instruction]  # from PTX
    machine: MachineCode

    def widths(self, operation: str, pointer: str) -> set[int]:
        """Bytes that a thread moves with each such instruction."""
        wanted = (operation, pointer)
        return {i.num_bytes for i in self.instructions if (i.operation, i.pointer) == wanted}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "machine": self.machine._asdict()}


@dataclass(frozen=True)
class Launch:
    """One launch that the backend would have made for a case."""

    case: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    settings: dict[str, Any]
    architecture: int = 0  # the oldest that it is for


class RecordingBackend(TritonBackend):
    """Keeps its launches instead of making them."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.launches: list[Launch] = []

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> None:
        case = self._case
        settings.setdefault("enable_fp_fusion", ENABLE_FP_FUSION)
        self.launches.append(Launch(str(case), kernel, grid, args, settings, case.architecture))


class CompilingBackend(TritonBackend):
    """Compiles for a card what it would launch on a CPU's tensors; outputs stay as they were allocated."""

    _interpreted = False

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self._architecture = architecture
        self.launches = 0

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> None:
        # Not before: importing Triton is a part of what a first lookup costs.
        from triton.runtime import driver

        driver.set_active(OfflineDriver(self._architecture))
        settings.setdefault("enable_fp_fusion", ENABLE_FP_FUSION)
        kernel.warmup(*args, grid=grid, **settings)
        self.launches += 1


def record_launches(cases: Iterable[Case]) -> tuple[list[Launch], dict[str, str]]:
    """What the backend launches for each case, in order, and for which cases it raised, and what."""
    launches: list[Launch] = []
    failures: dict[str, str] = {}
    for case in cases:
        backend = RecordingBackend(case)
        try:
            case.call(backend)
        except Exception as error:  # whatever it is, the other cases go on
            failures[str(case)] = f"{type(error).__name__}: {error}"
        else:
            launches += backend.launches
    return launches, failures


def compile_launches(
    architecture: int, launches: Sequence[Launch], advance: Callable[[Launch], None]
) -> tuple[list[Compiled], dict[str, str]]:
    """Compile each launch for such a card, and say so; returns also for which cases that failed, and why.

    Triton's driver stays replaced: nothing can be launched in this process any more.
    """
    import triton

    triton.runtime.driver.set_active(OfflineDriver(architecture))
    binaries: list[tuple[Launch, Any]] = []
    failures: dict[str, str] = {}
    for launch in launches:
        advance(launch)
        if launch.architecture > architecture:
            continue
        try:
            binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.settings)
        except Exception as error:  # as above
            failures[launch.case] = f"{launch.kernel.__name__}: {type(error).__name__}: {error}"
        else:
            binaries.append((launch, binary))
    # Triton keeps its binaries, so a launch like an earlier one has that one's.
    unique = {binary.hash: binary for _, binary in binaries}
    read = dict(zip(unique, _read_cubins(architecture, unique.values()), strict=True))
    usage = {name: resources(binary.asm["cubin"]) for name, binary in unique.items()}
    ptx = {name: list(read_ptx(binary.asm["ptx"])) for name, binary in unique.items()}
    compiled = [
        Compiled(
            kernel=launch.kernel.__name__,
            case=launch.case,
            architecture=architecture,
            binary=binary.hash,
            # Constants are written in capitals, and what the launch alone needs is not.
            settings={name: v for name, v in launch.settings.items() if name.isupper()},
            num_warps=binary.metadata.num_warps,
            registers=usage[binary.hash][0],
            spilled_bytes=usage[binary.hash][1],
            # Triton asks for all of it at the launch, so the binary does not tell.
            shared_bytes=binary.metadata.shared,
            instructions=ptx[binary.hash],
            machine=read[binary.hash],
        )
        for launch, binary in binaries
    ]
    return compiled, failures


def _read_cubins(architecture: int, binaries: Iterable[Any]) -> list[MachineCode]:
    """All in one call of the disassembler: it takes 0.3 s to start."""
    from triton import knobs

    codes = [machine_code(binary.asm["cubin"]) for binary in binaries]
    target = f"SM{architecture}{'a' if architecture >= 90 else ''}"  # what Triton compiles for
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        options = ("--no-dataflow", "--binary", target)
        printed = _output(knobs.nvidia.nvdisasm.path, *options, file.name)
    lines = re.findall(r"^\s*/\*\w+\*/\s+(.*?)\s*;", printed, re.MULTILINE)
    count = sum(map(len, codes)) // INSTRUCTION_BYTES
    if count != len(lines):
        raise RuntimeError(f"nvdisasm printed {len(lines)} instructions of {count}")
    read, first = [], 0
    for code in codes:
        end = first + len(code) // INSTRUCTION_BYTES
        read.append(read_machine_code(lines[first:end], first * INSTRUCTION_BYTES))
        first = end
    return read


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
