"""The `target` fixture: a test of every backend on every device; the header says which of them run."""

from collections.abc import Iterator

import pytest
import targets
import torch
from targets import CUDA, REQUIRE_GPU, Target

import gpu_embed
from gpu_embed import backends


@pytest.fixture(params=targets.params(*targets.COLLECTED))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Forces one backend for the test; `target.device` is where its tensors go."""
    yield from _forced(request.param, monkeypatch)


@pytest.fixture(params=targets.params(*targets.KERNELS))
def kernel_target(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    """`target` for what only the backends with kernels of our own have."""
    yield from _forced(request.param, monkeypatch)


def _forced(chosen: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    targets.require(chosen)
    if chosen == Target("cupy", "cpu"):
        import cuda_host_backend

        load, host_build = backends.load, cuda_host_backend.build()
        monkeypatch.setattr(
            backends, "load", lambda name: host_build if name == "cupy" else load(name)
        )
    with gpu_embed.use_backend(chosen.backend):
        yield chosen
        if chosen.device == "cuda":
            gpu_embed.check_bounds()


def pytest_report_header() -> list[str]:
    """One line a target: runs, or why not."""
    lines = []
    for one in targets.ALL:
        reason = targets.unusable_reason(one)
        how = ""
        if reason is None and one.device == "cpu":
            how = {"triton": " (interpreter)", "cupy": " (host build)"}.get(one.backend, "")
        lines.append(f"{one}: {reason or 'runs' + how}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are collected where there is one, or where GPU_EMBED_REQUIRE_GPU=1 asks for it."""
    if CUDA or REQUIRE_GPU:
        return
    config.hook.pytest_deselected(items=[item for item in items if "gpu" in item.keywords])
    items[:] = [item for item in items if "gpu" not in item.keywords]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not CUDA:
        pytest.fail("GPU_EMBED_REQUIRE_GPU=1 and there is no CUDA device")
    if item.get_closest_marker("large") is not None and CUDA:
        free = torch.cuda.mem_get_info()[0]
        if free < 24 * 2**30:
            pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
