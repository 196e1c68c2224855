"""CupyBackend on the CPU: its own host code, and its kernels as compiled by a C++ compiler.

Only the last step differs from a GPU: instead of CuPy, a loop calls the kernel for every thread of the grid.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from gpu_embed.backends._cupy import CupyBackend
from gpu_embed.backends._cupy.device import FLOATS, as_argument
from gpu_embed.backends._cupy.launch import CupyLaunches
from gpu_embed.backends._cupy.nvrtc import Kernel

KERNELS_DIR = Path(__file__).parents[2] / "kernels"
SHIM_DIR = Path(__file__).parent / "host_shim"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    # On a GPU a misaligned access kills the context; here the shim is told of it.
    "-fsanitize=alignment",
    "-Wall",
    "-Wno-unknown-pragmas",
)


def _all_kernels() -> tuple[Kernel, ...]:
    """Every kernel that CupyBackend can ask for."""
    launches = CupyLaunches()
    rows = {rows.ROWS for rows in (*launches.gather_rows.values(), launches.gather_long_rows)}
    flat, scatter, unroll, bag, tables_bag = (
        settings.UNROLL
        for settings in (
            launches.gather_flat,
            launches.scatter_add,
            launches.segment_sum,
            launches.bag_sum,
            launches.table_bag,
        )
    )
    tables = (
        ("float", (1, 2, 4)),
        ("double", (1, 2)),
        ("float16", (1, 2, 4)),
        ("bfloat16", (1, 2, 4)),
    )
    same = [(table, table, widths) for table, widths in tables]
    # Values of one dtype, and rows of another: the sums of 16-bit ones, and 16-bit rows that sums update.
    wide_sums = [(table, "float", widths) for table, widths in tables[2:]]
    updates = [*same, *(("float", table, widths) for table, widths in tables[2:])]
    # Outputs of another dtype than their tables', as few as show every dtype of both, and with weights.
    pairs = (
        ("bfloat16", "float"),
        ("float", "float16"),
        ("float16", "bfloat16"),
        ("float", "bfloat16"),
    )
    mixed = [(value, table, (4,)) for value, table in pairs]
    flags = ("false", "true")
    # Values and sums of atomics, which are added one by one in fp64.
    atomics = [
        *(
            f"{value}, float, {vec}"
            for value in ("float", "float16", "bfloat16")
            for vec in (1, 2, 4)
        ),
        "double, double, 1",
    ]
    # A dtype of rows, and one that they are converted to.
    conversions = (
        *((dtype, dtype) for dtype in FLOATS.values()),
        *(
            pair
            for narrow in ("float16", "bfloat16")
            for pair in (("float", narrow), (narrow, "float"))
        ),
    )
    words = [f"word{2**i}" for i in range(5)]
    found = [
        *(
            ("gather", f"{name}, {shard}>")
            for word in words
            for name in (
                *(f"gather_rows_kernel<{word}, {r}" for r in rows),
                f"gather_flat_kernel<{word}, {flat}",
            )
            for shard in flags
        ),
        *(
            ("scatter_add", f"scatter_add_kernel<{arguments}, {scatter}, {bags}, {in_place}>")
            for arguments in atomics
            for bags in flags
            for in_place in flags
            if in_place == "true" or "float16" not in arguments or arguments.endswith(" 4")
        ),
        *(("sort_keys", f"sort_keys_kernel<{shard}>") for shard in flags),
        *(
            ("segment_sum", f"segment_sum_kernel<{value}, {grad}, {', '.join(map(str, rest))}>")
            for value, grad, widths in (*same, *wide_sums, *mixed)
            for vec, scale, atomic in (
                *((vec, "false", "false") for vec in widths),
                (1, "true", "false"),
                *((vec, "false", "true") for vec in widths if grad in ("float", "double")),
            )
            for bags in flags
            for in_place in flags
            # New, they are the sums of row-wise Adagrad.
            if value == grad or in_place == "true" or (scale, atomic) == ("false",) * 2
            for rest in [(vec, scale, unroll, atomic, bags, in_place)]
        ),
        ("row_update", "select_rows_kernel"),
        *(
            ("row_update", f"row_update_kernel<{value}, {weight}, {vec}, {unroll}>")
            for value, weight, widths in updates
            for vec in widths
        ),
        *(
            ("row_update", f"rowwise_adagrad_kernel<{table}, {vec}>")
            for table, widths in tables
            for vec in widths
        ),
        *(
            ("bag", f"bag_sum_kernel<{table}, {vec}, {mean}, {bag}, {shard}>")
            for table, widths in tables
            for vec in widths
            for mean in flags
            for shard in flags
        ),
        *(("bag", f"bag_join_kernel<{table}>") for table, _ in tables),
        *(("tables", f"table_combine_kernel<{table}>") for table, _ in tables),
        *(
            ("bag", kernel)
            for table, widths in tables
            for vec in widths
            for kernel in (
                *(f"bag_max_kernel<{table}, {vec}, {bag}, {shard}>" for shard in flags),
                f"bag_sample_weights_kernel<{table}, {vec}>",
            )
        ),
        ("bag", "bag_of_kernel"),
        *(
            (
                "tables",
                f"table_bag_kernel<{table}, {output}, {vec}, {find}, {split}, {tables_bag}>",
            )
            for table, widths in tables
            for vec in widths
            for find, split, output in (
                ("false", "false", table),
                ("true", "false", table),
                ("false", "true", _cupy_accumulator(table)),
            )
        ),
        *(
            ("tables", f"table_bag_kernel<{table}, {output}, {vec}, {find}, false, {tables_bag}>")
            for output, table, widths in mixed
            for vec in widths
            for find in flags
        ),
        *(("tables", f"table_gather_kernel<{word}>") for word in words[1:]),
        ("tables", "table_keys_kernel"),
        *(
            ("tables", f"table_scatter_add_kernel<{arguments}, {tables_bag}>")
            for arguments in atomics
        ),
        *(
            ("tables", f"table_segment_sum_kernel<{value}, {grad}, {vec}, {unroll}, {in_place}>")
            for value, grad, widths in (*same, *wide_sums, *mixed)
            for vec in widths
            for in_place in flags
            if value == grad or in_place == "true" or vec == 4
        ),
        *(
            ("tables", f"table_sample_weights_kernel<{value}, {table}, {vec}>")
            for value, table, widths in (*same, *mixed)
            for vec in widths
        ),
        *(
            ("tables_row_update", f"table_row_update_kernel<{value}, {weight}, {vec}, {unroll}>")
            for value, weight, widths in updates
            for vec in widths
        ),
        *(
            ("tables_row_update", f"table_rowwise_adagrad_kernel<{table}, {vec}>")
            for table, widths in tables
            for vec in widths
        ),
        *(("renorm", f"renorm_kernel<{weight}>") for weight in FLOATS.values()),
        ("counts", "counts_kernel"),
        *(
            ("take", f"take_rows_kernel<{weight}, {output}, {vec}>")
            for weight, output in conversions
            for vec in ((1, 2) if weight == "double" else (1, 2, 4))
        ),
        *(
            ("dequantize", f"dequantize_rows_kernel<{scale}, {output}, {vec}, {bits}>")
            for scale, output in conversions
            for vec in (1, 2 if scale == "double" else 4)
            for bits in (8, 4)
        ),
        *(
            ("dequantize", f"dequantize_rows_kernel<{scale}, {output}, {vec}, {bits}, true>")
            for scale, bits in (("float", 8), ("float16", 4))
            for output in ("float", "float16", "bfloat16")
            for vec in (1, 4)
        ),
    ]
    return tuple(Kernel(*names) for names in dict.fromkeys(found))


def _cupy_accumulator(table: str) -> str:
    """What sums of that C++ type are taken in."""
    return "double" if table == "double" else "float"


KERNELS = _all_kernels()
TEST_KERNELS = tuple(
    Kernel("conversions", f"{way}_kernel<{dtype}>")
    for way in ("widen", "narrow")
    for dtype in ("float16", "bfloat16")
)


class HostShimCupyBackend(CupyBackend):
    """`CupyBackend` for CPU tensors.

    Args:
        library: what `compiled_library` returns.
        capability: the compute capability that the host code is told; from 9.0 on it asks for vector atomics.
        descending: run the threads of a grid backwards, to show that their order does not matter.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        capability: tuple[int, int] = (9, 0),
        descending: bool = False,
    ) -> None:
        super().__init__()
        self.launched: list[Kernel] = []
        self._library = library
        self._device_capability = capability
        self._descending = descending

    def unusable_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "the host build takes CPU tensors"

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
        assert blocks[0] < 2**31
        assert blocks[1] < 2**16
        assert threads[0] * threads[1] <= 1024
        values = [
            ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
            for value in map(as_argument, args)
        ]
        pointers = [ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values]
        outcome = self._library.host_launch(
            kernel.expression.encode(),
            (ctypes.c_uint * 2)(*blocks),
            (ctypes.c_uint * 2)(*threads),
            int(self._descending),
            (ctypes.c_void_p * len(values))(*pointers),
        )
        if outcome == 1:
            raise LookupError(f"{kernel} is not among the kernels of the host build")
        if outcome == 2:
            raise RuntimeError(f"{kernel} made a misaligned access")
        self.launched.append(kernel)

    def _capability(self, device: torch.device) -> tuple[int, int]:
        return self._device_capability


def unusable_reason() -> str | None:
    """Why the kernels cannot be built here; None: they can."""
    if os.name != "posix":
        return "the host build of the CUDA C kernels needs a POSIX system"
    return None if compiler() else "no C++ compiler (c++, g++ or clang++) on the PATH, nor in CXX"


def compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


@cache
def build() -> HostShimCupyBackend:
    """The backend on the CPU; compiles the kernels on first use."""
    return HostShimCupyBackend(compiled_library())


@cache
def compiled_library() -> ctypes.CDLL:
    """The kernels as a shared library, made once for all test processes and kept until a source changes."""
    cxx = compiler()
    assert cxx, unusable_reason()
    kernels = KERNELS + TEST_KERNELS
    sources = sorted([*KERNELS_DIR.glob("*.cu*"), *SHIM_DIR.iterdir()])
    code = "".join(
        [
            '#include "cuda_host_shim.h"\n',
            *(f'#include "{stem}.cu"\n' for stem in dict.fromkeys(k.stem for k in kernels)),
            "static const Kernels KERNELS = {\n",
            *(f'  {{"{k.expression}", &Launcher<&{k.expression}>::run}},\n' for k in kernels),
            "};\n",
            'extern "C" int host_launch(const char* name, const unsigned* blocks,\n'
            "    const unsigned* threads, int descending, void** args) {\n"
            "  return launch(KERNELS, name, blocks, threads, descending, args);\n}\n",
        ]
    )
    identity = [code, cxx, *FLAGS, *(path.read_text() for path in sources)]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gpu_embed_host_shim_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    library = folder / f"{digest}.so"
    with FileLock(folder / f"{digest}.lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                main, unit, linked = (
                    Path(scratch) / f"kernels.{end}" for end in ("cpp", "o", "so")
                )
                main.write_text(code)
                include = (f"-I{KERNELS_DIR}", f"-I{SHIM_DIR}")
                subprocess.run([cxx, *FLAGS, *include, "-c", main, "-o", unit], check=True)
                # Linked without -fsanitize: the shim brings the one function that it would bring in.
                subprocess.run([cxx, "-shared", unit, "-o", linked], check=True)
                linked.replace(library)
    return ctypes.CDLL(str(library))
