"""The `target` fixture: a test of every backend on every device; the header says which of them run. Two tiers."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import targets
import tiers
import torch
from targets import CUDA, REQUIRE_GPU, Target

import gpu_embed
from gpu_embed import backends

# Folders whose tests need a package that others do without, and how it is installed.
NEEDS = {"torchrec": ("torchrec", "make torchrec"), "vectors": ("gensim", "make test-all")}
LACKING = {
    folder
    for folder, (package, _) in NEEDS.items()
    if not any(metadata.distributions(name=package))
}


@pytest.fixture(params=targets.params(*targets.COLLECTED, *targets.PTX))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Forces one backend for the test; `target.device` is where its tensors go."""
    yield from _forced(request.param, monkeypatch)


@pytest.fixture(params=targets.params(*targets.KERNELS, *targets.PTX))
def kernel_target(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    """`target` for what only the backends with kernels of our own have."""
    yield from _forced(request.param, monkeypatch)


def _forced(chosen: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    targets.require(chosen)
    stand_in, load = targets.stand_in(chosen), backends.load
    if stand_in is not None:
        monkeypatch.setattr(
            backends, "load", lambda name: stand_in if name == chosen.backend else load(name)
        )
    with gpu_embed.use_backend(chosen.backend):
        yield chosen
        if chosen.device == "cuda":
            gpu_embed.check_bounds()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="both tiers: every product, model, process"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    full = tiers.is_full(collection_path, config.rootpath)
    is_lacking = any(collection_path == config.rootpath / "tests" / name for name in LACKING)
    return True if (full and not config.option.full) or is_lacking else None


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """Drops the cases that a mark `where` denies, and leaves to the full tier what is more than pairs.

    Here and not among the finished items, as it is making these that takes long.
    """
    yield
    wheres = [mark.args[0] for mark in metafunc.definition.iter_markers("where")]
    calls = [call for call in metafunc._calls if tiers.exists(call.params, wheres)]
    ptx = [call for call in calls if _runs_ptx(call)]
    calls = [call for call in calls if not _runs_ptx(call)]
    if tiers.runs_as_ptx(Path(metafunc.module.__file__), metafunc.config.rootpath):
        calls += [ptx[index] for index in tiers.pairwise([call.indices for call in ptx])]
    assert calls or not metafunc._calls, f"{metafunc.definition.nodeid}: no case is left"
    default = [call for call in calls if all(mark.name != "full" for mark in call.marks)]
    default = [default[index] for index in tiers.pairwise([call.indices for call in default])]
    if metafunc.config.option.full:
        in_default = {call.id for call in default}
        for call in calls:
            if call.id not in in_default:
                call.marks.append(pytest.mark.full.mark)
    # With no case left pytest would make one without parameters; this one is deselected as it is marked full.
    metafunc._calls = calls if metafunc.config.option.full else default or calls[:1]


def _runs_ptx(call: Any) -> bool:
    return any(call.params.get(name) in targets.PTX for name in ("target", "kernel_target"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The tier, and one line a target: runs, or why not."""
    lines = ["tier: " + ("full" if config.option.full else "default (--full runs everything)")]
    ways = {"triton-cpu": " (interpreter)", "cupy-cpu": " (host build)"}
    for one in (*targets.ALL, *targets.PTX):
        reason = targets.unusable_reason(one)
        how = " (compiled)" if one.ptx else ways.get(str(one), "")
        lines.append(f"{one}: {reason or 'runs' + how}")
    for folder, (_, command) in NEEDS.items():
        lines.append(
            f"{folder}: " + (f"not installed ({command})" if folder in LACKING else "runs")
        )
    return lines


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are collected where there is one, or where GPU_EMBED_REQUIRE_GPU=1 asks for it."""
    absent = set() if CUDA or REQUIRE_GPU else {"gpu"}
    absent |= set() if config.option.full else {"full"}
    kept, deselected = [], []
    for item in items:
        if tiers.is_full(item.path, config.rootpath):
            item.add_marker("full")
        (deselected if any(map(item.get_closest_marker, absent)) else kept).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not CUDA:
        pytest.fail("GPU_EMBED_REQUIRE_GPU=1 and there is no CUDA device")
    if item.get_closest_marker("large") is not None and CUDA:
        free = torch.cuda.mem_get_info()[0]
        if free < 24 * 2**30:
            pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
