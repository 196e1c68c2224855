"""Which backends and devices the suite runs on, said in the header and never silently."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

CUDA = torch.cuda.is_available()
REQUIRE_GPU = os.environ.get("GPU_EMBED_REQUIRE_GPU") == "1"
if not CUDA:
    # Read when triton is imported, which happens at the first use of its backend.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpu_embed  # noqa: E402
from gpu_embed import backends  # noqa: E402

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Target:
    """One backend on one device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def targets() -> list[object]:
    """Every backend on every device it has a way to run on; those on CUDA carry the mark gpu."""
    return [
        pytest.param(
            Target(name, device),
            id=f"{name}-{device}",
            marks=[pytest.mark.gpu] * (device == "cuda"),
        )
        for device in DEVICES
        for name in backends.BACKENDS
    ]


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Forces one backend for the test; `target.device` is where its tensors go."""
    chosen: Target = request.param
    reason = unusable_reason(chosen)
    if reason is not None:
        if chosen.device == "cuda" and REQUIRE_GPU:
            pytest.fail(f"GPU_EMBED_REQUIRE_GPU=1 and {chosen}: {reason}")
        pytest.skip(reason)
    if chosen == Target("cupy", "cpu"):
        load, shim = backends.load, _host_shim()
        monkeypatch.setattr(backends, "load", lambda name: shim if name == "cupy" else load(name))
    with gpu_embed.use_backend(chosen.backend):
        yield chosen
        if chosen.device == "cuda":
            gpu_embed.check_bounds()


def unusable_reason(chosen: Target) -> str | None:
    """Why the target cannot run here; None: it can."""
    if chosen.device == "cuda" and not CUDA:
        return "no CUDA device"
    if chosen == Target("cupy", "cpu"):
        return _host_shim_reason()
    return backends.load(chosen.backend).unusable_reason(torch.device(chosen.device))


def skip_without_kernel(chosen: Target, method: str) -> None:
    """Skip a gather or gradient method where the target has no kernel for it."""
    if chosen.backend not in ("triton", "cupy"):
        pytest.skip(f"{chosen.backend} has no choice of method")
    if chosen.backend == "cupy" and method in ("descriptor", "one_hot"):
        pytest.skip("only triton has such a kernel")
    old = chosen.device == "cuda" and torch.cuda.get_device_capability() < (9, 0)
    if method == "descriptor" and old:
        pytest.skip("tensor descriptors need compute capability 9.0")


def _host_shim_reason() -> str | None:
    if importlib.util.find_spec("cuda_host_backend") is None:
        return "the CUDA C kernels have no host build here"
    import cuda_host_backend

    reason: str | None = cuda_host_backend.unusable_reason()
    return reason


def _host_shim() -> object:
    import cuda_host_backend

    return cuda_host_backend.build()


def pytest_report_header() -> list[str]:
    """One line a target: runs, or why not."""
    lines = []
    for device in DEVICES:
        for name in backends.BACKENDS:
            chosen = Target(name, device)
            reason = unusable_reason(chosen)
            how = ""
            if reason is None and device == "cpu":
                how = {"triton": " (interpreter)", "cupy": " (host build)"}.get(name, "")
            lines.append(f"{chosen}: {reason or 'runs' + how}")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped with a reason where there is none, and fail where one is required."""
    for item in items:
        if "gpu" in item.keywords and not CUDA and not REQUIRE_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not CUDA and REQUIRE_GPU:
        pytest.fail("GPU_EMBED_REQUIRE_GPU=1 and there is no CUDA device")
    large = item.get_closest_marker("large")
    if large is not None and CUDA:
        free = torch.cuda.mem_get_info()[0]
        if free < 24 * 2**30:
            pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
