"""Triton's launches without a GPU: all of them but the driver, and binaries that are empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .codegen.compile import OfflineDriver

# The card does not matter: nothing is compiled for it.
ARCHITECTURE = 90
# grid x, y, z, stream, function, ..., and at the end the kernel's arguments
Driver = Callable[..., object]


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
