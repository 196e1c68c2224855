"""docs/older_cards.md quotes what is said on such cards; its code runs on the CUDA C++ kernels built for the host."""

import ast
import importlib.util
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_host_backend
import pytest
import torch
from commands import ROOT, check_printed, python_blocks
from cuda_host_backend import KERNELS, HostShimCupyBackend

import gpu_embed
from gpu_embed import backends, user_cache
from gpu_embed.backends._cupy import CupyBackend, cubin_cache, nvrtc
from gpu_embed.backends._cupy import device as cupy_device
from gpu_embed.backends._plan.trial_launch import no_cuda_device
from gpu_embed.backends._triton import TritonBackend
from gpu_embed.backends._triton import device as triton_device

PAGE = (ROOT / "docs/older_cards.md").read_text()
T4, V100 = ("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))
CUDA_12, CUDA_13 = (50, 60, 61, 70, 75, 80, 90), (75, 80, 90)


class FakeNvrtc:
    """Compiles nothing."""

    NVRTCError = ValueError

    def __init__(self, archs: tuple[int, ...] | Exception) -> None:
        self.archs = archs

    def getSupportedArchs(self) -> tuple[int, ...]:  # noqa: N802
        if isinstance(self.archs, Exception):
            raise self.archs
        return self.archs

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return (12, 9)

    def compileProgram(self, *_: object) -> None:  # noqa: N802
        raise self.NVRTCError

    def __getattr__(self, name: str) -> Any:
        return lambda *_: "the log"


def raising(error: Exception | None) -> Any:
    def call(*_: object) -> int:
        if error is not None:
            raise error
        return 1

    return call


def compile_gather(*_: object) -> None:
    nvrtc.compile_kernels("gather", ["gather_flat_kernel<word4, 4, false>"], "sm_70")


@dataclass
class Machine:
    """One with a card, and with all that CuPy needs, but for what is said."""

    card: tuple[str, tuple[int, int]] = T4
    packages: tuple[str, ...] = ("triton", "cupy")
    cuda_of_torch: str | None = "12.6"
    init: Exception | None = None
    count: Exception | None = None
    archs: tuple[int, ...] | Exception = CUDA_12
    launch: Any = lambda *_: None
    is_found: bool = True

    def set_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name, capability = self.card
        for place, value in (
            ("is_available", lambda: self.is_found),
            ("is_initialized", lambda: self.is_found),
            ("init", raising(self.init)),
            ("current_device", lambda: 0),
            ("is_current_stream_capturing", lambda: False),
            ("get_device_capability", lambda *_: capability),
            ("get_device_name", lambda *_: name),
        ):
            monkeypatch.setattr(torch.cuda, place, value)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.version, "cuda", self.cuda_of_torch)
        fake = SimpleNamespace(
            nvrtc=FakeNvrtc(self.archs),
            runtime=SimpleNamespace(getDeviceCount=raising(self.count)),
        )
        for module in (cupy_device, nvrtc):
            monkeypatch.setattr(module, "import_cupy", lambda: SimpleNamespace(cuda=fake))
        for module in (cupy_device, triton_device):
            monkeypatch.setattr(module, "find_spec", lambda name: name in self.packages or None)
        monkeypatch.setenv(user_cache.VARIABLE, "")
        found: dict[str, Any] = {"triton": TritonBackend(), "cupy": CupyBackend()}
        found["triton"]._interpreted = False
        found["cupy"]._trial.run = self.launch
        load = backends.load
        monkeypatch.setattr(backends, "load", lambda name: found.get(name) or load(name))


# What brings each row of the table about, in its order.
ROWS = [
    ("triton", Machine()),
    ("triton", Machine(packages=("cupy",))),
    ("cupy", Machine(is_found=False)),
    ("cupy", Machine(is_found=False, cuda_of_torch=None)),
    ("cupy", Machine(is_found=False, init=RuntimeError("The NVIDIA driver is too old"))),
    ("cupy", Machine(packages=("triton",))),
    ("cupy", Machine(count=RuntimeError("cudaErrorInsufficientDriver: CUDA driver"))),
    ("cupy", Machine(archs=OSError("libnvrtc.so.12: cannot open shared object file"))),
    ("cupy", Machine(card=V100, archs=CUDA_13)),
    (
        "cupy",
        Machine(
            launch=raising(
                RuntimeError(
                    "CUDA error: no kernel image is available for execution on the device\nmore"
                )
            )
        ),
    ),
    ("cupy", Machine(launch=compile_gather)),
    ("cupy", Machine(launch=raising(OSError("CUDA_ERROR_INVALID_IMAGE")))),
]


def quoted_reasons() -> list[str]:
    table = PAGE.partition("## What it may say")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.*?)` \| ", table, re.M)


def test_every_row_of_the_table_is_brought_about() -> None:
    assert len(quoted_reasons()) == len(ROWS)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_reason_is_said_in_the_words_of_the_table(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, machine = ROWS[row]
    machine.set_up(monkeypatch)
    quoted = quoted_reasons()
    # A device that torch does not find is not the default.
    device = "cpu" if "not cpu" in quoted[row] else "cuda"
    said = backends.available_backends(device)[name]
    patterns = [re.escape(one).replace(re.escape("..."), ".+") for one in quoted]
    # The first that fits, as one reads a table.
    assert next(n for n, one in enumerate(patterns) if re.fullmatch(one, said)) == row, said


def first_words(function: Any) -> list[str]:
    """How what a function returns begins, where it begins with words."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    texts = [node.values[0] if isinstance(node, ast.JoinedStr) else node for node in returned]
    return [
        node.value
        for node in texts
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_reason_of_the_cupy_backend_has_its_row() -> None:
    found = [*first_words(CupyBackend.unusable_reason), *first_words(no_cuda_device)]
    assert len(found) == 9
    # Those of AMD know what they have.
    found.remove("only NVIDIA cards are supported")
    for words in found:
        assert any(quoted.startswith(words) for quoted in quoted_reasons()), words


def test_what_explain_says_when_cupy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    quoted = re.findall(r"^cupy serves .*$", PAGE, re.M)
    machines = (Machine(), Machine(card=V100), Machine(packages=("cupy",)))
    assert len(quoted) == len(machines)
    for line, machine in zip(quoted, machines, strict=True):
        with monkeypatch.context() as patch, gpu_embed.use_backend("auto"):
            machine.set_up(patch)
            assert backends.explain() == line
            assert backends.available_backends()["cupy"] == "usable"


def test_what_explain_says_when_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(packages=()).set_up(monkeypatch)
    with gpu_embed.use_backend("auto"):
        assert "`torch serves cuda as the last resort`" in PAGE
        assert backends.explain().startswith("torch serves cuda as the last resort; triton: ")


@pytest.fixture
def archs() -> set[int]:
    """What the NVRTC that is installed here compiles for."""
    pytest.importorskip("cupy")
    try:
        return set(nvrtc.import_cupy().cuda.nvrtc.getSupportedArchs())
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")


def test_nvrtc_needs_no_compiler_and_no_toolkit(
    archs: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the PATH there is nothing, and the code is the card's own."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv(user_cache.VARIABLE, "")
    for arch in {60, 61, 70, 75} & archs:
        assert nvrtc.target_for(arch) == f"sm_{arch}"
        compiled = nvrtc.compile_kernels("counts", ["counts_kernel"], nvrtc.target_for(arch))
        assert compiled.image.startswith(b"\x7fELF")


@pytest.mark.full
def test_no_kernel_uses_16_bit_arithmetic(archs: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In PTX each of its instructions names the type."""
    if 70 not in archs:
        pytest.skip("this NVRTC does not know 7.0")
    monkeypatch.setenv(user_cache.VARIABLE, "")
    kernels = [kernel for kernel in KERNELS if "float16" in kernel.expression]
    stems = {kernel.stem for kernel in kernels}
    assert stems >= {"scatter_add", "segment_sum", "bag", "tables", "row_update", "take", "renorm"}
    for stem in sorted(stems):
        # Of those that differ in numbers and flags alone, the last.
        named = {
            re.sub(r"\b(\d+|true|false)\b", "", kernel.expression): kernel.expression
            for kernel in kernels
            if kernel.stem == stem
        }
        ptx = nvrtc.compile_kernels(stem, list(named.values()), "compute_70").image.decode()
        assert ".f32" in ptx
        assert re.findall(r"\.b?f16(?:x2)?\b", ptx) == []


def test_the_cache_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert r"`%LOCALAPPDATA%\gpu_embed`" in PAGE
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv(user_cache.VARIABLE, raising=False)
    monkeypatch.setenv("LOCALAPPDATA", "local")
    assert user_cache.folder() == Path("local/gpu_embed")
    file = cubin_cache.file_for("source", ["kernel"], ["-arch=sm_70"], "12.9")
    assert file is not None
    assert re.search(r"names have (\d+) characters", PAGE)[1] == str(len(file.name))


def test_what_cupy_warns_of_on_windows() -> None:
    found = importlib.util.find_spec("cupy")
    if found is None or found.origin is None:
        pytest.skip("cupy is not installed")
    assert "`CUDA path could not be detected`" in PAGE
    said = Path(found.origin).with_name("_environment.py").read_text(encoding="utf-8")
    assert "CUDA path could not be detected" in said


def test_both_kernel_backends_support_the_same() -> None:
    text = (ROOT / "docs/backends.md").read_text()
    table = text.partition("## What is supported")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+? \| (\w+) \| (\w+) \| \w+ \| \w+ \|$", table, re.M)
    assert rows[0] == ("triton", "cupy")
    assert len(rows) > 10
    assert all(triton == cupy for triton, cupy in rows[1:])


@pytest.mark.full
@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5)], ids=str)
def test_the_code_of_the_page_runs_on_the_host_build(
    capability: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if reason := cuda_host_backend.unusable_reason():
        pytest.skip(reason)
    backend = HostShimCupyBackend(cuda_host_backend.compiled_library(), capability)
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "cupy" else load(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(PAGE))
    scope: dict[str, Any] = {"__name__": "page"}
    with gpu_embed.use_backend("cupy"):
        exec(compile(code, "docs/older_cards.md", "exec"), scope)
    output = capsys.readouterr().out
    check_printed(code, output)
    assert "cupy serves cpu: forced by use_backend() or GPU_EMBED_BACKEND\n" in output
    assert "cupy: usable\n" in output
    launched = {kernel.expression for kernel in backend.launched}
    for dtype in ("float16", "bfloat16"):
        assert any(one.startswith(f"segment_sum_kernel<{dtype}, ") for one in launched)
    # What later cards alone have is not asked for.
    assert not any(re.match(r"scatter_add_kernel<float, float, [24]", one) for one in launched)
    assert {"cupy": "right"}.items() <= {
        check["backend"]: check["status"] for check in scope["env_report"].collect()["checks"]
    }.items()
