"""The host's microseconds per call, on the CPU, with nothing to wait for.

The Triton backend is measured whole, with Triton's own launch code, up to the call of the driver, which needs a
GPU. So the figures say what Python, autograd and the allocation cost; on a GPU the driver's launch comes on top.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_embed
from gpu_embed import backends
from gpu_embed.tune.offline import OfflineDriver

from .timing import Call, host_us

MODES = ("inference", "forward", "forward + backward")
TORCH_BACKEND = "gpu_embed, torch backend"
VOCAB, DIM, NUM_IDS = 128, 16, 8
# The card does not matter: nothing is compiled for it.
ARCHITECTURE = 90
# grid x, y, z, stream, function, ..., and at the end the kernel's arguments
Driver = Callable[..., object]


@dataclass(frozen=True)
class HostTime:
    """One lookup's host time in one mode."""

    who: str
    mode: str  # one of MODES
    us: float
    times_torch: float  # us over that of torch.nn.functional.embedding


def measure_host_time(seconds: float = 0.4) -> list[HostTime]:
    """torch's lookup and ours, in turns, `seconds` for each pair of mode and backend."""
    times = []
    for mode in MODES:
        for who, setting in _targets():
            with setting():
                calls = [_call(of, mode) for of in (F.embedding, gpu_embed.functional.embedding)]
                theirs, ours = host_us(calls, torch.device("cpu"), seconds)
            times.append(HostTime(who, mode, ours, ours / theirs))
            if who == TORCH_BACKEND:
                times.insert(-1, HostTime("torch", mode, theirs, 1.0))
    return times


def _targets() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield TORCH_BACKEND, lambda: gpu_embed.use_backend("torch")
    if importlib.util.find_spec("triton") is not None:
        yield "gpu_embed, triton backend up to the driver", stub_triton


@contextmanager
def stub_triton() -> Iterator[None]:
    """Lookups on the CPU go through the Triton backend, which launches kernels that do nothing.

    Outputs are uninitialised: this is for the host's time alone.
    """
    from gpu_embed.backends._triton import TritonBackend
    from gpu_embed.backends._triton.known_launch import Known, launch

    class StubBackend(TritonBackend):
        _interpreted = False
        _kernels = SimpleNamespace(
            **{
                name: stub_kernel(kernel.fn)
                for name, kernel in vars(TritonBackend()._kernels).items()
            }
        )

        def _launch(
            self,
            kernel: Any,
            grid: tuple[int, ...],
            device: torch.device,
            *args: Any,
            **settings: Any,
        ) -> Known | None:
            return launch(kernel, grid, device.index, args, settings)

    # Forced and freed again, so that the former choice returns whatever happens.
    with stub_driver(), gpu_embed.use_backend("triton"):
        backends._selected["triton", torch.device("cpu")] = StubBackend()
        yield


def _call(lookup: Callable[[Tensor, Tensor], Tensor], mode: str) -> Call:
    table = torch.randn(VOCAB, DIM, device="cpu")
    weight = torch.nn.Parameter(table, requires_grad=mode != "inference")
    ids = torch.randint(VOCAB, (NUM_IDS,), device="cpu")
    grad_output = torch.ones(NUM_IDS, DIM, device="cpu")

    def forward(i: int) -> None:
        lookup(ids, weight)

    def forward_backward(i: int) -> None:
        weight.grad = None
        lookup(ids, weight).backward(grad_output)

    return Call(forward_backward if mode == "forward + backward" else forward)


def stub_kernel(function: Callable[..., Any], driver: Driver = lambda *launch: None) -> Any:
    """A kernel that Triton launches as any other, but for what it compiles to: a call of `driver`."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    class StubBinary(CompiledKernel):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.module = self.function = self.name = "stub"
            self.packed_metadata = self.src = None
            self._run = driver

        def __del__(self) -> None:
            """Newer versions of Triton unload a binary here, and nothing was loaded."""

    class StubFunction(JITFunction):  # type: ignore[misc, unused-ignore]
        def create_binder(self) -> Any:
            binder = super().create_binder()
            # Set by the above, once for each device.
            self.compile = lambda *source, **options: StubBinary()
            return binder

    return StubFunction(function)


@contextmanager
def stub_driver() -> Iterator[None]:
    """Triton finds a card, so that such kernels can be launched."""
    from triton.runtime import driver

    former = dict(vars(driver))
    driver.set_active(OfflineDriver(ARCHITECTURE))
    try:
        yield
    finally:
        vars(driver).clear()
        vars(driver).update(former)
