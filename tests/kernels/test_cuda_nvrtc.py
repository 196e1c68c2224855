"""The CUDA C++ kernels compiled by NVRTC for every generation of cards, with no GPU and no CUDA toolkit."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_host_backend import KERNELS

from gpu_embed import user_cache
from gpu_embed.backends._cupy import CupyBackend, nvrtc
from gpu_embed.backends._cupy import device as cupy_device
from gpu_embed.backends._cupy.nvrtc import Kernel
from gpu_embed.bench.ptx.launch_cupy import parameter_names
from gpu_embed.bench.ptx.machine import Program

ARCHS = (60, 70, 75, 80, 90)
STEMS = tuple(dict.fromkeys(kernel.stem for kernel in KERNELS))


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not read from the user's cache, nor kept there."""
    monkeypatch.setenv(user_cache.VARIABLE, "")


def missing(reason: str) -> None:
    """Skip, but fail where continuous integration promises to have everything."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must compile the CUDA C++ kernels: {reason}")
    pytest.skip(reason)


@cache
def nvrtc_archs() -> tuple[int, ...] | str:
    """The cards that this NVRTC compiles for, or why there is none."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed"
    try:
        return nvrtc.import_cupy().cuda.nvrtc.getSupportedArchs()
    except Exception as error:
        return f"cupy finds no NVRTC: {error}"


def require(arch: int) -> None:
    archs = nvrtc_archs()
    if isinstance(archs, str):
        missing(archs)
    elif arch not in archs:
        pytest.skip(f"this NVRTC compiles for sm_{min(archs)} and newer")


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_without_spills(arch: int, stem: str) -> None:
    require(arch)
    expressions = [kernel.expression for kernel in KERNELS if kernel.stem == stem]
    image, symbols, log = nvrtc.compile_kernels(
        stem, expressions, f"sm_{arch}", ("--ptxas-options=-v",)
    )
    assert image.startswith(b"\x7fELF")
    assert len(set(symbols.values())) == len(expressions)
    # ptxas reports each kernel, and with it the functions that it calls.
    reports = log.split(f"for 'sm_{arch}'")[1:]
    assert set(re.findall(r"entry function '(\w+)'", log)) == set(symbols.values())
    assert len(reports) == len(symbols)
    for report in reports:
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report
        )
        assert set(frames) == {("0", "0", "0")}
        # 65536 registers a multiprocessor: at least two blocks of 256 threads run side by side.
        assert int(re.findall(r"Used (\d+) registers", report)[0]) <= 128
    # Constants in global memory would be loads that nobody wrote; sm_90's headers bring one byte.
    assert int(re.findall(r"(\d+) bytes gmem", log)[0]) <= 1


@pytest.mark.parametrize("stem", STEMS)
def test_the_interpreter_of_ptx_knows_every_kernel(stem: str) -> None:
    """Of those that differ in numbers alone, the last, which has the widest vectors."""
    require(90)
    ours = [kernel for kernel in KERNELS if kernel.stem == stem]
    kernels = {re.sub(r"\b\d+", "", kernel.expression): kernel for kernel in ours}.values()
    expressions = [kernel.expression for kernel in kernels]
    image, symbols, _ = nvrtc.compile_kernels(stem, expressions, "compute_90")
    for kernel in kernels:
        parsed = Program(image.decode(), symbols[kernel.expression]).kernel
        assert parsed.name == symbols[kernel.expression]
        assert len(parsed.parameters) == len(parameter_names(kernel))


def nvdisasm() -> Path | None:
    """Triton ships it."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return tool if tool.exists() else None


def sass(kernel: Kernel, arch: int) -> set[str]:
    """The opcodes of one kernel, with their modifiers."""
    require(arch)
    tool = nvdisasm()
    if tool is None:
        missing("triton, which brings nvdisasm, is not installed")
    compiled = nvrtc.compile_kernels(kernel.stem, [kernel.expression], f"sm_{arch}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.image)
        cubin.flush()
        text = subprocess.run(
            [str(tool), cubin.name], capture_output=True, text=True, check=True
        ).stdout
    section = text.split(f".section\t.text.{compiled.symbols[kernel.expression]},")[1]
    section = section.split(".section\t")[0]
    return set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section, re.M))


def accesses(opcodes: set[str], name: str) -> set[int]:
    """Bits that one instruction moves, over the loads (LDG) or stores (STG) of a kernel."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return {
        next((bits for part, bits in widths.items() if part in opcode.split(".")), 32)
        for opcode in opcodes
        if opcode.split(".")[0] == name
    }


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bytes_", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["gather_flat_kernel", "gather_rows_kernel"])
@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_word_is_moved_by_one_instruction(arch: int, bytes_: int, name: str, shard: str) -> None:
    opcodes = sass(Kernel("gather", f"{name}<word{bytes_}, 4, {shard}>"), arch)
    # Ids are loaded in four widths, the record stores 32 and 64 bits; no other width but the word's.
    assert accesses(opcodes, "LDG") == {8, 16, 32, 64, 8 * bytes_}
    assert accesses(opcodes, "STG") == {32, 64, 8 * bytes_}


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("gather", "gather_rows_kernel<word16, 4, "),
        ("gather", "gather_flat_kernel<word4, 4, "),
        ("sort_keys", "sort_keys_kernel<"),
        ("bag", "bag_sum_kernel<float, 4, true, 4, "),
        ("bag", "bag_max_kernel<bfloat16, 4, 4, "),
    ],
)
def test_a_whole_table_pays_nothing_for_shards(stem: str, name: str) -> None:
    """Its kernel does not read what a shard is told."""
    require(90)
    kernels = [Kernel(stem, f"{name}{shard}>") for shard in ("false", "true")]
    image, symbols, _ = nvrtc.compile_kernels(
        stem, [kernel.expression for kernel in kernels], "compute_90"
    )
    for kernel, is_shard in zip(kernels, (False, True), strict=True):
        for argument in ("first_row", "table_rows"):
            number = parameter_names(kernel).index(argument)
            parameter = f"[{symbols[kernel.expression]}_param_{number}]"
            assert (parameter in image.decode()) is is_shard


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("stem", "arguments", "load_bits", "store_bits"),
    [
        ("take", "float, float, 4", 128, 128),
        ("take", "float, bfloat16, 4", 128, 64),
        ("dequantize", "float, float, 4, 8", 32, 128),
        ("dequantize", "float, float16, 4, 4", 16, 64),
        ("dequantize", "float, float, 4, 8, true", 32, 128),
        ("dequantize", "float16, bfloat16, 4, 4, true", 16, 64),
    ],
)
def test_taken_rows_move_in_vectors(
    arch: int, stem: str, arguments: str, load_bits: int, store_bits: int
) -> None:
    opcodes = sass(Kernel(stem, f"{stem}_rows_kernel<{arguments}>"), arch)
    # Ids are loaded in four widths, the record stores 32 and 64 bits.
    assert accesses(opcodes, "LDG") == {8, 16, 32, 64, load_bits}
    assert accesses(opcodes, "STG") == {32, 64, store_bits}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("values", "grads", "vec", "load_bits", "store_bits"),
    [
        ("float", "float", 4, 128, 128),
        ("double", "double", 2, 128, 128),
        ("bfloat16", "bfloat16", 4, 64, 64),
        ("float16", "float", 4, 64, 128),
    ],
)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_segment_sum_loads_and_stores_vectors(
    arch: int, values: str, grads: str, vec: int, load_bits: int, store_bits: int, in_place: bool
) -> None:
    expression = f"segment_sum_kernel<{values}, {grads}, {vec}, false, 4, false, false, {str(in_place).lower()}>"
    opcodes = sass(Kernel("segment_sum", expression), arch)
    # Partial sums take 128 bits; NVRTC stores some of fp64 one by one.
    assert accesses(opcodes, "LDG") == {8, 16, 32, 64, 128, load_bits}
    singly = {64} if values == "double" else set()
    assert accesses(opcodes, "STG") == {128, store_bits, *singly}
    assert not [opcode for opcode in opcodes if opcode.startswith(("ATOM", "RED"))]


@pytest.mark.parametrize(
    ("arch", "vec", "atomic"), [(80, 4, "F32"), (90, 2, "F32x2"), (90, 4, "F32x4")]
)
def test_ends_of_chunks_are_added_and_the_rest_is_stored(arch: int, vec: int, atomic: str) -> None:
    expression = f"segment_sum_kernel<float, float, {vec}, false, 4, true, false, false>"
    opcodes = sass(Kernel("segment_sum", expression), arch)
    found = {opcode for opcode in opcodes if opcode.startswith("RED")}
    assert {part for opcode in found for part in opcode.split(".") if "F32" in part} == {atomic}
    assert not [opcode for opcode in opcodes if opcode.startswith("ATOM")]
    assert accesses(opcodes, "STG") == {32 * vec}


@pytest.mark.parametrize(
    ("arch", "vec", "atomic"),
    [(80, 4, "F32"), (80, 1, "F32"), (90, 1, "F32"), (90, 2, "F32x2"), (90, 4, "F32x4")],
)
@pytest.mark.parametrize("values", ["float", "bfloat16"])
def test_scatter_add_adds_vectors_from_sm_90_on(
    arch: int, vec: int, atomic: str, values: str
) -> None:
    expression = f"scatter_add_kernel<{values}, float, {vec}, 4, false, true>"
    opcodes = sass(Kernel("scatter_add", expression), arch)
    found = {opcode for opcode in opcodes if opcode.startswith("RED")}
    # A reduction returns nothing; an ATOM would wait for the old value, a CAS would loop.
    assert {part for opcode in found for part in opcode.split(".") if "F32" in part} == {atomic}
    assert not [opcode for opcode in opcodes if opcode.startswith("ATOM")]
    assert vec * (32 if values == "float" else 16) in accesses(opcodes, "LDG")


def test_double_atomics_do_not_loop() -> None:
    opcodes = sass(
        Kernel("scatter_add", "scatter_add_kernel<double, double, 1, 4, false, true>"), 80
    )
    assert any(opcode.startswith("RED") and "F64" in opcode for opcode in opcodes)
    assert not [opcode for opcode in opcodes if opcode.startswith("ATOM")]


def test_a_card_newer_than_nvrtc_gets_ptx() -> None:
    archs = nvrtc_archs()
    if isinstance(archs, str):
        missing(archs)
    image, symbols, _ = nvrtc.compile_kernels("counts", ["counts_kernel"], nvrtc.target_for(999))
    assert symbols == {"counts_kernel": "counts_kernel"}
    assert ".visible .entry counts_kernel(" in image.decode()
    assert f".target sm_{max(archs)}" in image.decode()


def test_subnormal_sums_are_not_flushed() -> None:
    """PTX says .ftz where the compiler was told to turn subnormal floats into zeros."""
    if isinstance(nvrtc_archs(), str):
        missing(str(nvrtc_archs()))
    for stem in STEMS:
        expressions = [kernel.expression for kernel in KERNELS if kernel.stem == stem]
        ptx = nvrtc.compile_kernels(stem, expressions[-1:], "compute_90").image.decode()
        assert not re.findall(r"\b(?:add|mul|fma)\.(?:\w+\.)?ftz", ptx)


def test_updates_round_every_product() -> None:
    """A product that is fused with the addition behind it is not what the formulas say."""
    if isinstance(nvrtc_archs(), str):
        missing(str(nvrtc_archs()))
    (kernel,) = (k for k in KERNELS if k.expression == "row_update_kernel<float, float, 1, 4>")
    ptx = nvrtc.compile_kernels("row_update", [kernel.expression], "compute_90").image.decode()
    assert "mul.rn.f32" in ptx
    assert not re.findall(r"fma\.\S*f32", ptx)


def test_an_error_shows_the_compilers_log(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(nvrtc_archs(), str):
        missing(str(nvrtc_archs()))
    broken = nvrtc.source("counts").replace("blockDim.x", "block_dim")
    monkeypatch.setattr(nvrtc, "source", lambda stem: broken)
    with pytest.raises(
        RuntimeError, match=r'(?s)counts\.cu for .*\bcounts\.cu\(1\d\): .*"block_dim" is undefined'
    ):
        nvrtc.compile_kernels("counts", ["counts_kernel"], "sm_90")


class Driver:
    """Stands in for CuPy's driver calls: takes the image, and writes down each launch."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.launches: list[tuple[object, ...]] = []
        self.cuda = SimpleNamespace(
            Device=nullcontext, Module=lambda: self, nvrtc=nvrtc.import_cupy().cuda.nvrtc
        )

    def load(self, image: bytes) -> None:
        self.images.append(image)

    def get_function(self, name: str) -> Callable[..., None]:
        assert name.encode() in self.images[-1]
        return lambda *args, stream: self.launches.append((name, *args, stream.ptr))


def test_a_launch_passes_addresses_and_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    require(90)
    driver = Driver()
    for module in (cupy_device, nvrtc):
        monkeypatch.setattr(module, "import_cupy", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backend = CupyBackend()
    device = torch.device("cuda", 0)
    tensor = torch.zeros(3)
    counts, renorm = Kernel("counts", "counts_kernel"), Kernel("renorm", "renorm_kernel<float>")
    backend._launch(counts, (2, 1), (256, 1), device, tensor, None, 5)
    backend._launch(renorm, (1, 1), (64, 1), device, 1.5)
    backend._launch(counts, (3, 1), (256, 1), device, -1)
    backend._launch(counts, (0, 1), (256, 1), device, -1)
    first, second, third = driver.launches
    assert first == ("counts_kernel", (2, 1), (256, 1), [tensor.data_ptr(), 0, 5], 77)
    assert second[1:] == ((1, 1), (64, 1), [1.5], 77)
    assert third[1:] == ((3, 1), (256, 1), [-1], 77)
    # Compiled and loaded once each.
    assert len(driver.images) == 2


def test_the_kernels_need_no_header() -> None:
    """NVRTC alone is enough: pip brings it without CUDA's headers."""
    for stem in STEMS:
        assert "#include" not in nvrtc.source(stem)


def test_nvrtc_comes_from_pip_without_a_toolkit() -> None:
    """Where the wheel is installed, CuPy must load that one, with no CUDA path in the environment."""
    try:
        wheel = importlib.metadata.distribution("nvidia-cuda-nvrtc-cu12")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc-cu12 is not installed")
    if isinstance(nvrtc_archs(), str):
        missing(str(nvrtc_archs()))
    code = (
        "from cupy.cuda import nvrtc; nvrtc.getVersion(); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libnvrtc.so' in line})"
    )
    hidden = ("CUDA_PATH", "CUDA_HOME", "LD_LIBRARY_PATH")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    inside = Path(str(wheel.locate_file("nvidia"))).resolve()
    assert [Path(path).is_relative_to(inside) for path in done.stdout.split()] == [True]
