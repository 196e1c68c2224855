"""A Triton backend on CPU tensors whose kernels are compiled for a card, and whose PTX runs here."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_embed.backends._triton import TritonBackend
from gpu_embed.backends._triton.device import ENABLE_FP_FUSION, WordsOf
from gpu_embed.tune.offline import OfflineDriver

from .fresh import watches_memory, written
from .machine import Program
from .memory import GlobalMemory, Region
from .warp import WARP

ARCHITECTURE = 90


class KeptWords(WordsOf):
    """A tensor's memory under another dtype, and the tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor, dtype: Any) -> None:
        super().__init__(tensor, dtype)
        self.tensor = tensor


@watches_memory
class PtxBackend(TritonBackend):
    """`TritonBackend` with its launches run by `Program`."""

    _interpreted = False
    _view = KeptWords

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()  # by kernel

    def unusable_reason(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        return None if device.type == "cpu" else "PTX runs on CPU tensors alone"

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> None:
        settings.setdefault("enable_fp_fusion", ENABLE_FP_FUSION)
        self.launches[kernel.__name__] += 1
        binary = _compile(kernel, grid, args, settings)
        self._run(binary, grid, dict(zip(kernel.arg_names, args, strict=False)))

    def _run(self, binary: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launch(binary, grid, arguments)


@contextmanager
def running_ptx() -> Iterator[None]:
    """Whatever Triton kernel code launches by itself, as `kernel[grid](...)`, is compiled and runs here."""
    from triton.runtime.jit import KernelInterface

    def prepare(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **settings: Any) -> None:
            binary = _compile(kernel, grid, args, settings)
            launch(binary, grid, {**dict(zip(kernel.arg_names, args, strict=False)), **settings})

        return run

    former = KernelInterface.__getitem__
    KernelInterface.__getitem__ = prepare
    try:
        yield
    finally:
        KernelInterface.__getitem__ = former


def _compile(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]
) -> Any:
    with offline():
        return compiled_kernel(kernel).warmup(*args, grid=grid, **settings)


def launch(binary: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel that Triton has compiled.

    Args:
        arguments: by name, at least those that are no constants.

    Raises:
        PtxError: see `Program.run`.
    """
    program = _program(binary.asm["ptx"])
    values: list[int | float | bytes] = []
    regions = []
    for name, kind in binary.src.signature.items():
        value: Any = arguments.get(name)
        if hasattr(value, "data_ptr"):
            regions.append(region(name, value))
            value = value.data_ptr()
        if kind != "constexpr":
            values.append(value or 0)
    # Behind them come Triton's own buffers, which no kernel of ours asks for.
    values += [0] * (len(program.kernel.parameters) - len(values))
    block = (binary.metadata.num_warps * WARP,)
    program.run(grid, block, values, GlobalMemory(regions), binary.metadata.shared)


def region(name: str, value: Tensor | KeptWords) -> Region:
    """From a tensor's first element to its last."""
    tensor = value.tensor if isinstance(value, KeptWords) else value
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    num_bytes = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return Region(name, tensor.data_ptr(), num_bytes, written(tensor))


@cache
def _program(ptx: str) -> Program:
    return Program(ptx)


def compiled_kernel(kernel: Any) -> Any:
    """The kernel as Triton compiles it, also where it was imported for Triton's interpreter."""
    from triton.runtime.jit import JITFunction

    return kernel if isinstance(kernel, JITFunction) else _twin(kernel)


@cache
def _twin(interpreted: Any) -> Any:
    from triton.runtime.jit import JITFunction

    # With the decorator's arguments, as `do_not_specialize`: else other code is compiled than a card gets.
    return JITFunction(interpreted.fn, **interpreted.kwargs)


@contextmanager
def offline() -> Iterator[None]:
    """Triton compiles for a card that is not here, and what its interpreter would run is compiled too.

    No other thread may run Triton's interpreter meanwhile.
    """
    from triton import language
    from triton.runtime import driver
    from triton.runtime.interpreter import InterpretedFunction

    with _one_at_a_time:
        former = dict(vars(driver))
        # A kernel calls functions of its module and of Triton's library by their names there.
        swaps = [
            (vars(module), name, value, _twin(value))
            for path, module in list(sys.modules.items())
            if path.startswith(("gpu_embed.kernels", "triton.language"))
            for name, value in vars(module).items()
            if isinstance(value, InterpretedFunction)
        ]
        core = vars(language.core)
        swaps += [
            (core, name, value, original)
            for name, value in core.items()
            if (original := _original(name, value)) is not value
        ]
        driver.set_active(OfflineDriver(ARCHITECTURE))
        for names, name, _, compiled in swaps:
            names[name] = compiled
        try:
            yield
        finally:
            for names, name, value, _ in swaps:
                names[name] = value
            vars(driver).clear()
            vars(driver).update(former)


def _original(name: str, value: Any) -> Any:
    """What triton.language.core had under a name, before the interpreter left a function of its own behind."""
    from triton import language

    if getattr(value, "__kwdefaults__", None) and "member" in value.__kwdefaults__:
        return value.__kwdefaults__["member"]
    return getattr(language, name, value) if callable(value) else value


_one_at_a_time = threading.RLock()
