"""What the tests that need a GPU share: a forced backend, data on the device, CUDA graphs, a guard against syncs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import gpu_embed
from gpu_embed import backends

DEVICE = "cuda"
REQUIRE_GPU = os.environ.get("GPU_EMBED_REQUIRE_GPU") == "1"


def forced(name: str) -> Iterator[str]:
    require(name)
    with gpu_embed.use_backend(name):
        yield name
        gpu_embed.check_bounds()
    torch.cuda.empty_cache()


def require(name: str) -> None:
    """Skip without the backend's library; with it, a backend that cannot run fails a required GPU run."""
    reason = backends.load(name).unusable_reason(torch.device(DEVICE))
    if reason is None:
        return
    if REQUIRE_GPU and find_spec(name) is not None:
        pytest.fail(f"GPU_EMBED_REQUIRE_GPU=1 and {name}: {reason}")
    pytest.skip(reason)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random integers in [-2, 2], drawn where they are used."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator, device=DEVICE).to(dtype)


def random_ids(num_indices: int, num_embeddings: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(num_embeddings, (num_indices,), generator=generator, device=DEVICE)


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """The graph of step(), and the tensors that step() returned, which each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@contextmanager
def no_host_sync() -> Iterator[None]:
    """torch raises at each of its operators that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
