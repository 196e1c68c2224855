"""Memory that an operation allocates: full of garbage, and nobody may read or return a byte before it is written."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_embed.backends.protocol import Backend

from .formats import Array
from .memory import GARBAGE
from .parse import PtxError

BackendClass = TypeVar("BackendClass", bound=type)
# Those that leave their result without a value.
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class FreshMemory(TorchDispatchMode):
    """Watches over what is allocated while it is entered: torch's operators here, kernels by `written`."""

    def __init__(self) -> None:
        super().__init__()
        # By address: the storage, which so keeps its address, and which of its bytes were written.
        self._storages: dict[int, tuple[torch.UntypedStorage, Array]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket.__name__
        passed = [*_passed(func._schema.arguments, args, kwargs or {})]
        # Of a view, or of the tensor that a new one is to be like, no element is read.
        if not operator.startswith("new_") and not operator.endswith("_like"):
            for argument, tensor in passed:
                if argument.alias_info is None:
                    self.require_written(tensor, f"torch.{operator}")
        result = func(*args, **(kwargs or {}))
        for argument, tensor in passed:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._bytes(tensor)[...] = True
        if operator in ALLOCATE:
            storage = result.untyped_storage()
            ctypes.memset(storage.data_ptr(), GARBAGE, storage.nbytes())
            self._storages[storage.data_ptr()] = storage, np.zeros(storage.nbytes(), bool)
        return result

    def require_written(self, tensor: Tensor, who: str) -> None:
        # Of a caller's own tensor, which may be large, nothing is known.
        if self.written(tensor) is None:
            return
        missing = ~self._bytes(tensor).all(-1)
        if missing.any():
            place = np.argwhere(missing)[0].tolist()
            raise PtxError(
                f"{who} gets a tensor {[*tensor.shape]} of which {missing.sum()} elements were not written, "
                f"the first at {place}"
            )

    def written(self, tensor: Tensor) -> Array | None:
        """Which bytes were written, from the tensor's first one to the end of its storage; None: nobody knows."""
        found = self._storages.get(tensor.untyped_storage().data_ptr())
        return None if found is None else found[1][tensor.storage_offset() * tensor.itemsize :]

    def _bytes(self, tensor: Tensor) -> Array:
        """Which bytes of each element were written: [*shape, itemsize]."""
        size = tensor.itemsize
        shape, steps = (*tensor.shape, size), (*(n * size for n in tensor.stride()), 1)
        known = self.written(tensor) if tensor.numel() else None
        if known is None:
            return np.ones(shape, bool)
        return np.lib.stride_tricks.as_strided(known, shape, steps)


def _passed(
    arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Any, Tensor]]:
    """Each tensor, with the argument that the operator has it for."""
    for place, argument in enumerate(arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor):
                yield argument, one


def written(tensor: Tensor) -> Array | None:
    """See `FreshMemory.written`, of the operation that this thread is in."""
    memory: FreshMemory | None = getattr(_here, "memory", None)
    return None if memory is None else memory.written(tensor)


def watches_memory(backend: BackendClass) -> BackendClass:
    """A `Backend` whose operations watch over what they allocate, and check what they return."""
    for name in vars(Backend):
        if not name.startswith("_") and name != "unusable_reason":
            method = getattr(backend, name)
            made = _prepares(method) if name == "prepare_embedding" else watched(method)
            setattr(backend, name, made)
    return backend


def _prepares(method: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(method)(lambda *args: watched(method(*args)))


def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, in memory that is watched; one within another belongs to that one."""

    @wraps(operation)
    def run(*args: Any, **kwargs: Any) -> Any:
        if getattr(_here, "memory", None) is not None:
            return operation(*args, **kwargs)
        memory = _here.memory = FreshMemory()
        try:
            with memory:
                result = operation(*args, **kwargs)
        finally:
            del _here.memory
        for tensor in result if isinstance(result, tuple) else (result,):
            if tensor is not None:
                memory.require_written(tensor, f"the caller of {operation.__name__}")
        return result

    return run


_here = threading.local()
