"""What every launch of a Triton kernel goes through: the device, the kernels, and views of tensors as words."""

import threading
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._plan.in_force import InForce
from .._plan.trial_launch import TrialLaunch, no_cuda_device
from .known_launch import Known, launch
from .launch import TritonLaunches, TritonMethods

# Triton compiles for these and newer cards only.
MIN_CAPABILITY = (8, 0)
# Passed explicitly, because Triton's default is about to change; the kernels were checked with this.
ENABLE_FP_FUSION = True


class TritonDevice:
    """The part of the Triton backend that launches, whatever the kernel."""

    name = "triton"
    _launches = InForce(name, "launches", TritonLaunches())
    _methods: InForce[Any] = InForce(name, "methods", TritonMethods())

    def __init__(self) -> None:
        self._trial = TrialLaunch(self)

    def unusable_reason(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed (pip install triton; Linux only)"
        try:
            interpreted = self._interpreted
        except Exception as error:  # a broken install, or a version without what the kernels use
            return f"triton does not work here: {error}"
        if interpreted:
            return None
        if device.type != "cuda":
            return (
                f"triton kernels need a CUDA device, not {device.type} "
                "(or TRITON_INTERPRET=1 in the environment)"
            )
        if not torch.cuda.is_available():
            return no_cuda_device()
        if torch.version.hip is not None:
            return "only NVIDIA cards are supported"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"triton needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            )
        return self._trial.failure(device)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> Known | None:
        """Launch, and say how to launch the same again where this device is the current one."""
        if self._interpreted:
            # It runs one kernel at a time.
            with _interpreter_lock:
                kernel[grid](*args, **settings)
            return None
        settings.setdefault("enable_fp_fusion", ENABLE_FP_FUSION)
        if device.index == torch.cuda.current_device():
            return launch(kernel, grid, device.index, args, settings)
        # Triton launches on the current device.
        with torch.cuda.device(device):
            launch(kernel, grid, device.index, args, settings)
        return None

    @cached_property
    def _unfused(self) -> dict[str, bool]:
        """Rounds every product before it is added, as the formulas say; the interpreter does anyhow."""
        return {} if self._interpreted else {"enable_fp_fusion": False}

    @cached_property
    def _interpreted(self) -> bool:
        return not isinstance(self._kernels.gather_rows, self._triton.JITFunction)

    @cached_property
    def _triton(self) -> Any:
        import triton

        return triton

    @cached_property
    def _view(self) -> Callable[[Tensor, Any], Any]:
        """A tensor as words of another dtype, without keeping it alive."""
        if not self._interpreted:
            return WordsOf
        # The interpreter reads more of a tensor than its address.
        return lambda tensor, dtype: self._triton.reinterpret(_not_kept(tensor), dtype)

    @cached_property
    def _words(self) -> dict[int, Any]:
        """tl.int* by size in bytes."""
        from triton import language as tl

        return {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

    @cached_property
    def _kernels(self) -> SimpleNamespace:
        if self._triton.knobs.runtime.interpret:
            from .interpreter import complete

            complete()
        from ...kernels import (
            bag,
            counts,
            dequantize,
            gather,
            renorm,
            row_update,
            scatter_add,
            segment_sum,
            sort_keys,
            tables,
            tables_row_update,
            take,
        )

        return SimpleNamespace(
            gather_rows=gather.gather_rows_kernel,
            gather_flat=gather.gather_flat_kernel,
            scatter_add=scatter_add.scatter_add_kernel,
            sort_keys=sort_keys.sort_keys_kernel,
            segment_sum=segment_sum.segment_sum_kernel,
            renorm=renorm.renorm_kernel,
            counts=counts.counts_kernel,
            select_rows=row_update.select_rows_kernel,
            row_update=row_update.row_update_kernel,
            rowwise_adagrad=row_update.rowwise_adagrad_kernel,
            bag_sum=bag.bag_sum_kernel,
            bag_join=bag.bag_join_kernel,
            bag_max=bag.bag_max_kernel,
            bag_of=bag.bag_of_kernel,
            bag_sample_weights=bag.bag_sample_weights_kernel,
            table_bag=tables.table_bag_kernel,
            table_combine=tables.table_combine_kernel,
            table_gather=tables.table_gather_kernel,
            table_keys=tables.table_keys_kernel,
            table_scatter_add=tables.table_scatter_add_kernel,
            table_segment_sum=tables.table_segment_sum_kernel,
            table_sample_weights=tables.table_sample_weights_kernel,
            take_rows=take.take_rows_kernel,
            dequantize_rows=dequantize.dequantize_rows_kernel,
            table_row_update=tables_row_update.table_row_update_kernel,
            table_rowwise_adagrad=tables_row_update.table_rowwise_adagrad_kernel,
        )


def _not_kept(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor that does not keep it."""
    if tensor.is_meta:
        return tensor.detach()
    kept = tensor.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(
        kept.data_ptr(), tensor.device, kept.nbytes()
    )
    view = tensor.new_empty(0)
    return view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


class WordsOf:
    """A tensor's memory under another dtype, all that a launch asks for: triton.reinterpret takes five
    times as long, and keeps the tensor alive.
    """

    __slots__ = ("_address", "dtype")

    def __init__(self, tensor: Tensor, dtype: Any) -> None:
        self._address = tensor.data_ptr()
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


_interpreter_lock = threading.RLock()
