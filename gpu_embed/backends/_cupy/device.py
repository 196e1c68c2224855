"""What every launch of a CUDA C++ kernel goes through: compiled at first use, on torch's stream."""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._plan.in_force import InForce
from .._plan.trial_launch import TrialLaunch, no_cuda_device
from .launch import CupyLaunches, CupyMethods
from .nvrtc import Kernel, compile_kernels, import_cupy, target_for

# atomicAdd(double) needs sm_60.
MIN_CAPABILITY = (6, 0)

FLOATS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class CupyDevice:
    """The part of the CuPy backend that launches, whatever the kernel."""

    name = "cupy"
    _launches = InForce(name, "launches", CupyLaunches())
    _methods: InForce[Any] = InForce(name, "methods", CupyMethods())

    def __init__(self) -> None:
        self._functions: dict[tuple[int, Kernel], Any] = {}
        self._trial = TrialLaunch(self)

    def unusable_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"cupy kernels need a CUDA device, not {device.type}"
        if find_spec("cupy") is None:
            return (
                'cupy is not installed: install the extra "cupy12", or "cupy13" for CUDA 13 '
                '(from a clone: pip install ".[cupy12]")'
            )
        if not torch.cuda.is_available():
            return no_cuda_device()
        if torch.version.hip is not None:
            return "only NVIDIA cards are supported"
        try:
            cupy = import_cupy()
            cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # a wheel for another CUDA, a missing library, an old driver
            return f"cupy does not work here: {error}"
        try:
            archs = cupy.cuda.nvrtc.getSupportedArchs()
        except Exception as error:
            return f"cupy finds no NVRTC, which the extras cupy12 and cupy13 bring: {error}"
        major, minor = torch.cuda.get_device_capability(device)
        lowest = max(MIN_CAPABILITY, divmod(min(archs), 10))
        if (major, minor) < lowest:
            return (
                f"this NVRTC compiles for compute capability {lowest[0]}.{lowest[1]} and newer, "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
            )
        return self._trial.failure(device)

    def _launch(
        self,
        kernel: Kernel,
        blocks: tuple[int, int],
        threads: tuple[int, int],
        device: torch.device,
        *args: Tensor | int | float | None,
    ) -> None:
        """Run a kernel on torch's current stream; tensors go by address, int as int64, float as double."""
        if 0 in blocks:
            return
        cupy = import_cupy()
        index = torch.cuda.current_device() if device.index is None else device.index
        # torch and CuPy may each carry a copy of the CUDA runtime, so each is told the device.
        with torch.cuda.device(index), cupy.cuda.Device(index):
            function = self._functions.get((index, kernel))
            if function is None:
                function = self._functions[index, kernel] = self._load(kernel, device)
            stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
            function(blocks, threads, [as_argument(arg) for arg in args], stream=stream)

    def _load(self, kernel: Kernel, device: torch.device) -> Any:
        """The kernel, compiled for the current device and loaded there."""
        major, minor = self._capability(device)
        target = target_for(10 * major + minor)
        compiled = compile_kernels(kernel.stem, (kernel.expression,), target)
        module = import_cupy().cuda.Module()
        module.load(compiled.image)
        return module.get_function(compiled.symbols[kernel.expression])

    def _capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)


class _Stream(NamedTuple):
    """What CuPy asks of a stream. Its own class for foreign streams has changed between versions."""

    ptr: int


def as_argument(arg: Tensor | int | float | None) -> int | float:
    if isinstance(arg, Tensor):
        address = arg.data_ptr()
        return _device_address(address) if arg.is_cpu and arg.is_pinned() else address
    return 0 if arg is None else arg


@cache
def _device_address(host_address: int) -> int:
    """Where the device finds pinned host memory: a record's flag, which is never freed."""
    attributes = import_cupy().cuda.runtime.pointerGetAttributes(host_address)
    return int(attributes.devicePointer)


def itemsize(tensor: Tensor | None) -> int:
    """Bytes an item; 0 for a tensor that the kernel does without."""
    return 0 if tensor is None else tensor.element_size()


def cpp_bool(flag: bool) -> str:
    return "true" if flag else "false"
