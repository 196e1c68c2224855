"""Compiles the Triton kernels for cards that are not here, and reads what came out.

`python tests/codegen.py 90` prints one line for each kernel that the cases below launch, compiled for sm_90;
with `--json` it prints what `Compiled` holds. No GPU is needed: Triton's wheel brings the assembler and the
disassembler.

What is compiled is what `TritonBackend` would have launched: it runs on tensors without data, and Triton's own
launch path specialises the arguments. So a changed launch table changes what is compiled here.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gpu_embed
from gpu_embed.backends._triton import GATHER_ROWS, TritonBackend
from gpu_embed.bounds import BoundsRecord

ARCHITECTURES = (80, 90, 100)
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One call of the backend, by the shapes and dtypes that decide what it launches."""

    operation: str  # "embedding", "atomic", "sorted", "renorm" or "counts"
    embedding_dim: int = 1
    dtype: torch.dtype = torch.float32
    num_indices: int = 64
    num_embeddings: int = 50_000
    index_dtype: torch.dtype = torch.int64
    padding_idx: int = -1
    record: bool = False  # whether ids out of range are recorded
    scale_grad_by_freq: bool = False
    norm_type: float = 2.0
    transposed: bool = False  # the columns of the table, or of the gradient, lie apart

    def __str__(self) -> str:
        """The operation, D, the dtype, and what differs from the defaults."""
        words = [self.operation, f"D{self.embedding_dim}", _short(self.dtype)]
        if self.num_indices != 64:
            words.append(f"N{self.num_indices}")
        if self.num_embeddings != 50_000:
            words.append(f"V{self.num_embeddings}")
        if self.index_dtype != torch.int64:
            words.append(f"ids_{_short(self.index_dtype)}")
        if self.padding_idx != -1:
            words.append(f"padding{self.padding_idx}")
        if self.norm_type != 2.0:
            words.append(f"norm{self.norm_type:g}")
        words += [
            flag for flag in ("record", "scale_grad_by_freq", "transposed") if getattr(self, flag)
        ]
        return "-".join(words)

    def access_bytes(self, itemsize: int) -> int:
        """The widest access that rows of this case allow, their items being of that size."""
        return itemsize if self.transposed else gcd(16, self.embedding_dim * itemsize)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Triton compiles another kernel where an integer argument is 1, or is a multiple of 16, or needs 64 bits.
PAST_INT32 = 2**31 + 16
CASES = (
    # Every row of the gather's table; its key is words of 8 bytes.
    *(Case("embedding", 4 * words, BF16, record=True) for words in GATHER_ROWS),
    Case("embedding", 8 * max(GATHER_ROWS), BF16),
    Case("embedding", 128, FP32, num_indices=3073, index_dtype=torch.int32),
    Case("embedding", 64, FP32, num_embeddings=1, num_indices=1),
    Case("embedding", 64, FP32, transposed=True),
    Case("embedding", 1, FP64, record=True),
    Case("embedding", 1, BF16, record=True),
    Case("embedding", 1, torch.int32, padding_idx=3),
    Case("embedding", 4, torch.uint8, num_indices=PAST_INT32, record=True),
    # Rows that are no power of two of words.
    Case("embedding", 768, BF16, record=True),
    Case("embedding", 768, BF16, num_indices=1, record=True),
    Case("embedding", 12, FP32, index_dtype=torch.int32),
    Case("embedding", 3, torch.complex128),
    Case("embedding", 300, BF16, record=True),
    Case("embedding", 50, FP32, num_indices=3073),
    Case("embedding", 5, FP32, index_dtype=torch.int16, record=True),
    Case("embedding", 33, FP16, index_dtype=torch.uint8, record=True),
    Case("embedding", 3, torch.uint8, num_indices=PAST_INT32),
    Case("embedding", 33, FP16, transposed=True),
    Case("atomic", 128),
    Case("atomic", 768, num_indices=3073, index_dtype=torch.int32, padding_idx=0),
    Case("atomic", 50),
    Case("atomic", 33),
    Case("atomic", 1),
    Case("atomic", 4, num_indices=1, num_embeddings=1, padding_idx=0),
    Case("atomic", 4, num_indices=PAST_INT32, index_dtype=torch.uint8),
    Case("atomic", 64, transposed=True),
    Case("atomic", 32, FP64),
    Case("atomic", 33, FP64),
    Case("sorted", 4096, BF16),
    Case("sorted", 768, BF16, scale_grad_by_freq=True, num_embeddings=100),
    Case("sorted", 300, BF16),
    Case("sorted", 50, BF16, index_dtype=torch.uint8, num_embeddings=200),
    Case("sorted", 1, BF16),
    Case("sorted", 64, BF16, transposed=True),
    Case("sorted", 768, FP32),
    Case("sorted", 50, FP32, scale_grad_by_freq=True, padding_idx=0),
    Case("sorted", 16, FP32, num_indices=3073),
    Case("sorted", 1, FP32, num_indices=PAST_INT32, num_embeddings=PAST_INT32),
    Case("sorted", 64, FP64),
    Case("sorted", 33, FP64, scale_grad_by_freq=True),
    Case("sorted", 128, FP32, num_indices=1, num_embeddings=1),
    Case("renorm", 128),
    Case("renorm", 128, norm_type=1.0),
    Case("renorm", 128, norm_type=0.0),
    Case("renorm", 128, norm_type=INF),
    Case("renorm", 128, norm_type=-INF),
    Case("renorm", 128, norm_type=2.5),
    Case("renorm", 300, BF16),
    Case("renorm", 4096, FP16, norm_type=3.0),
    Case("renorm", 33, FP64, norm_type=-1.0),
    Case("renorm", 1, FP64, num_indices=1, num_embeddings=1),
    Case("renorm", 64, transposed=True),
    Case("counts"),
    Case("counts", num_indices=PAST_INT32, index_dtype=torch.uint8),
)


# Operations on global memory.
ACCESSES = ("load", "store", "add", "exchange")


class Instruction(NamedTuple):
    """One instruction that leaves the thread's registers."""

    operation: str  # one of ACCESSES, or "shared", "shuffle", "barrier", "local"
    pointer: str  # an access's address, by its name in the source, as `weight_ptr`; else ""
    num_bytes: int  # that a thread moves with an access; else 0
    in_loop: bool


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture, as one launch of one case specialises it."""

    kernel: str
    settings: dict[str, Any]  # the launch's constants
    registers: int  # a thread's
    spilled_bytes: int  # a thread's stack and local memory
    shared_bytes: int
    instructions: list[Instruction]
    # The same, read from the machine code: for the first launch of each kernel, and where registers spilled.
    machine_instructions: list[Instruction] | None

    def widths(self, operation: str, pointer: str) -> set[int]:
        """Bytes that a thread moves with each such instruction."""
        return {
            i.num_bytes
            for i in self.instructions
            if (i.operation, i.pointer) == (operation, pointer)
        }


def read_json(text: str) -> dict[str, list[Compiled] | str]:
    """What `--json` printed: for each case, by name, its launches in order, or why it did not compile."""

    def instructions(rows: list[list[Any]] | None) -> Any:
        return rows and [Instruction(*row) for row in rows]

    compiled: dict[str, list[Compiled] | str] = {}
    for name, launches in json.loads(text).items():
        if isinstance(launches, str):
            compiled[name] = launches
            continue
        for launch in launches:
            for field in ("instructions", "machine_instructions"):
                launch[field] = instructions(launch[field])
        compiled[name] = [Compiled(**launch) for launch in launches]
    return compiled


# Recording.


class RecordingBackend(TritonBackend):
    """Hands its launches over instead of making them."""

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> None:
        self._record(kernel, grid, args, settings)


def run_case(case: Case, backend: TritonBackend) -> None:
    """Call the backend on tensors without data, whose addresses count as aligned."""
    meta = torch.device("meta")
    ids = torch.empty(case.num_indices, dtype=case.index_dtype, device=meta)

    def matrix(rows: int) -> torch.Tensor:
        if case.transposed:
            return torch.empty(case.embedding_dim, rows, dtype=case.dtype, device=meta).T
        return torch.empty(rows, case.embedding_dim, dtype=case.dtype, device=meta)

    if case.operation == "embedding":
        record = BoundsRecord(meta) if case.record else None
        backend.embedding(matrix(case.num_embeddings), ids, case.padding_idx, record)
    elif case.operation in ("atomic", "sorted"):
        with gpu_embed.use_gradient_method(case.operation):
            backend.embedding_dense_backward(
                matrix(case.num_indices),
                ids,
                case.num_embeddings,
                case.padding_idx,
                case.scale_grad_by_freq,
            )
    elif case.operation == "renorm":
        backend.embedding_renorm_(matrix(case.num_embeddings), ids, 1.5, case.norm_type)
    else:
        backend.embedding_counts(ids, case.num_embeddings)


# Compiling.


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


def compile_cases(
    architecture: int, cases: Iterable[Case]
) -> Iterator[tuple[Case, list[Compiled] | Exception]]:
    """Compile every launch of every case."""
    import triton

    triton.runtime.driver.set_active(OfflineDriver(architecture))
    read: dict[int, Compiled] = {}
    seen: set[str] = set()
    launches: list[Compiled] = []

    def compile_launch(kernel: Any, grid: Any, args: Any, settings: dict[str, Any]) -> None:
        binary = kernel.warmup(*args, grid=grid, **settings)
        # Triton keeps its kernels, so a launch like an earlier one gives that one's binary.
        if id(binary) not in read:
            name = kernel.__name__
            read[id(binary)] = _read(name, settings, binary.asm, first=name not in seen)
            seen.add(name)
        launches.append(read[id(binary)])

    backend = RecordingBackend(compile_launch)
    for case in cases:
        launches.clear()
        try:
            run_case(case, backend)
        except Exception as error:
            yield case, error
        else:
            yield case, list(launches)


def _read(kernel: str, settings: dict[str, Any], asm: dict[str, Any], first: bool) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        used = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)}
        spilled = used["STACK"] + used["LOCAL"]
        machine_instructions = None
        if first or spilled:
            # The data flow analysis only names branch targets, and takes half of the time.
            options = ("-c", "-g", "--no-dataflow")
            sass = _output(knobs.nvidia.nvdisasm.path, *options, cubin.name)
            machine_instructions = list(_machine_instructions(sass))
    return Compiled(
        kernel,
        settings,
        registers=used["REG"],
        spilled_bytes=spilled,
        shared_bytes=used["SHARED"],
        instructions=list(_ptx_instructions(asm["ptx"])),
        machine_instructions=machine_instructions,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Reading.

_OPERATIONS = {
    # PTX
    "ld": "load",
    "st": "store",
    "add": "add",
    "exch": "exchange",
    "bar": "barrier",
    "barrier": "barrier",
    "shfl": "shuffle",
    # machine code
    "LDG": "load",
    "STG": "store",
    "RED": "add",
    "REDG": "add",
    "ATOMG": "add",
    "EXCH": "exchange",
    "BAR": "barrier",
    "SHFL": "shuffle",
    "LDS": "shared",
    "STS": "shared",
    "LDL": "local",
    "STL": "local",
}


def _ptx_instructions(ptx: str) -> Iterator[Instruction]:
    """Triton writes each memory access as it is to be, so PTX tells widths, and lines of the source."""
    files = {
        number: str(Path(folder, name))
        for number, folder, name in re.findall(r'\.file\s+(\d+) "([^"]*)"(?: "([^"]*)")?', ptx)
    }
    lines = ptx.splitlines()
    loops = _loops(lines, r"(\$L\w+):", r"\bbra(?:\.uni)?\s+(\$L\w+);")
    pointer = ""
    for number, line in enumerate(lines):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            pointer = _pointer(files[location[1]], int(location[2]))
            continue
        found = re.match(r"\s*(?:@!?%\w+\s+)?((?:ld|st|atom|red|bar|barrier|shfl)\.[\w.:]+)", line)
        parts = found[1].split(".") if found else ["param"]
        if "param" in parts:
            continue
        in_loop = any(number in loop for loop in loops)
        operation = next(_OPERATIONS[part] for part in parts if part in _OPERATIONS)
        if any(part.startswith("shared") for part in parts):
            operation = "shared"
        if operation in ACCESSES:
            items = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
            bits = next(int(p[1:]) for p in reversed(parts) if re.fullmatch(r"[bfsu]\d+", p))
            yield Instruction(operation, pointer, items * bits // 8, in_loop)
        else:
            yield Instruction(operation, "", 0, in_loop)


def _machine_instructions(sass: str) -> Iterator[Instruction]:
    lines = sass.splitlines()
    loops = _loops(lines, r"(\.L_x_\d+):", r"`\((\.L_x_\d+)\)")
    pointer = ""
    for number, line in enumerate(lines):
        if location := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            pointer = _pointer(location[1], int(location[2]))
            continue
        found = re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line)
        parts = found[1].split(".") if found else [""]
        if parts[0] not in _OPERATIONS:
            continue
        in_loop = any(number in loop for loop in loops)
        operation = _OPERATIONS["EXCH" if "EXCH" in parts else parts[0]]
        if operation in ACCESSES:
            yield Instruction(operation, pointer, _machine_bytes(parts), in_loop)
        else:
            yield Instruction(operation, "", 0, in_loop)


def _machine_bytes(parts: list[str]) -> int:
    """The width in an instruction's name; 4 bytes go without saying."""
    for part in parts:
        if found := re.fullmatch(r"[US]?(8|16|64|128|256)|F(\d+)(?:x(\d))?", part):
            return int(found[1] or found[2]) * int(found[3] or 1) // 8
    return 4


def _loops(lines: list[str], label: str, jump: str) -> list[range]:
    """The lines between a label and each later jump back to it."""
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(lines):
        if found := re.match(label, line):
            labels[found[1]] = number
        elif (found := re.search(jump, line)) and found[1] in labels:
            loops.append(range(labels[found[1]], number))
    return loops


@cache
def _pointer(file: str, line: int) -> str:
    """The first `*_ptr` of the memory access at a line of the kernels' source; "" where there is none."""
    if not file.endswith(".py"):
        return ""
    for node in ast.walk(_module(file)):
        if (
            isinstance(node, ast.Call)
            and node.lineno <= line <= (node.end_lineno or node.lineno)
            and re.fullmatch(r"tl\.(load|store|atomic_\w+)", ast.unparse(node.func))
        ):
            return next(iter(re.findall(r"\w+_ptr\b", ast.unparse(node.args[0]))), "")
    return ""


@cache
def _module(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def _line(case: Case, compiled: Compiled) -> str:
    """One launch for people: resources, then how often which access is made."""
    counts = Counter(
        f"{i.operation} {i.pointer.removesuffix('_ptr')}{i.num_bytes * 8 or ''}{'*' if i.in_loop else ''}"
        for i in compiled.instructions
    )
    accesses = ", ".join(f"{name} x{count}" for name, count in counts.items())
    return (
        f"{case!s:44} {compiled.kernel:20} {compiled.registers:3} registers, "
        f"{compiled.spilled_bytes} spilled, {compiled.shared_bytes} shared; {accesses}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", type=int, help="80, 90, 100: compute capability times ten")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of one line a launch"
    )
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.k in str(case)]
    results: dict[str, Any] = {}
    for case, launches in compile_cases(options.architecture, chosen):
        if isinstance(launches, Exception):
            results[str(case)] = f"{type(launches).__name__}: {launches}"
        else:
            results[str(case)] = [asdict(launch) for launch in launches]
        if options.json:
            continue
        if isinstance(launches, Exception):
            print(f"{case!s:44} {results[str(case)]}", flush=True)
            continue
        for launch in launches:
            print(_line(case, launch), flush=True)
    if options.json:
        json.dump(results, sys.stdout)
