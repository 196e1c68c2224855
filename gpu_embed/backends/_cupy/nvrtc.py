"""The CUDA C++ kernels compiled by NVRTC, with no GPU and no CUDA headers.

CuPy's RawModule would compile and launch, but it refuses to work without CUDA's headers, which these kernels do
not need and pip does not bring, and it compiles with -ftz=true, which turns subnormal gradients into zeros.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from . import cubin_cache
from .cubin_cache import Compiled

OPTIONS = ("-std=c++17",)
# These round every product before it is added, as their formulas say.
UNFUSED = dict.fromkeys(("row_update", "tables_row_update"), ("-fmad=false",))


class Kernel(NamedTuple):
    """One kernel of one file, as NVRTC names it."""

    stem: str  # of the file in gpu_embed/kernels
    expression: str  # its name in C++, with template arguments


def target_for(arch: int) -> str:
    """What to compile for a card of ten times this compute capability.

    One that NVRTC does not know gets PTX for the newest older one, which the driver compiles.
    """
    known = import_cupy().cuda.nvrtc.getSupportedArchs()
    return f"sm_{arch}" if arch in known else f"compute_{max(a for a in known if a <= arch)}"


def compile_kernels(
    stem: str, expressions: Sequence[str], target: str, options: tuple[str, ...] = ()
) -> Compiled:
    """Compile kernels of gpu_embed/kernels/<stem>.cu, or find them in the cache; needs no GPU and no CUDA headers.

    Args:
        target: as NVRTC's -arch: "sm_90" gives a cubin, "compute_90" PTX.
        options: further options of NVRTC.

    Raises RuntimeError with NVRTC's log if the code does not compile.
    """
    nvrtc = import_cupy().cuda.nvrtc
    all_options = (f"-arch={target}", *OPTIONS, *UNFUSED.get(stem, ()), *options)
    version = ".".join(map(str, nvrtc.getVersion()))
    file = cubin_cache.file_for(source(stem), expressions, all_options, version)
    kept = cubin_cache.read(file)
    if kept is not None:
        return kept
    program = nvrtc.createProgram(source(stem), f"{stem}.cu", [], [])
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, all_options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(
                f"gpu_embed: NVRTC cannot compile {stem}.cu for {target}\n{log}"
            ) from error
        # CuPy cuts off the image's last byte, taking it for the end of a string.
        real = target.startswith("sm_")
        image = nvrtc.getCUBIN(program) + b"\0" if real else nvrtc.getPTX(program)
        symbols = {name: nvrtc.getLoweredName(program, name) for name in expressions}
        compiled = Compiled(image, symbols, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)
    cubin_cache.write(file, compiled)
    return compiled


@cache
def source(stem: str) -> str:
    """A kernel file with what it includes put in its place, once, so that NVRTC looks for no file.

    Its messages, and the lines in PTX, name the file that a line comes from.
    """
    folder = resources.files("gpu_embed.kernels")
    included: set[str] = set()

    def expanded(name: str) -> str:
        lines = [f'#line 1 "{name}"']
        # Windows has another encoding by default.
        text = (folder / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            found = re.fullmatch(r'#include "(\w+\.cuh)"', line)
            lines += [once(found[1]), f'#line {number + 1} "{name}"'] if found else [line]
        return "\n".join(lines) + "\n"

    def once(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        return expanded(name).replace("#pragma once\n", "\n")

    return expanded(f"{stem}.cu")


@cache
def import_cupy() -> Any:
    import cupy

    return cupy
