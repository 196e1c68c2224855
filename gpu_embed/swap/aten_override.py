"""torch's own lookup and its gradient, served by our kernels while a block runs."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..dtypes import FLOATS
from ..ops import lookup as ops


@contextmanager
def override_aten() -> Iterator[None]:
    """In a `with` block, `aten::embedding` and `aten::embedding_dense_backward` run on our kernels.

    That reaches what `replace_embeddings` leaves alone: subclasses of torch's layer, `torch.nn.functional.embedding`,
    traced and scripted models. For the gradient, the block has to span the backward pass too. Also a decorator.
    Blocks nest; the outermost one registers and, left in any way, takes back.

    What runs is the backend that serves the tensors' device; where that is torch, torch's own kernel. Covered are
    CUDA tensors, and with TRITON_INTERPRET=1 and `use_backend("triton")` CPU tensors; elsewhere the block
    changes nothing. A call that no kernel of ours serves, such as one whose arguments are in error, goes to the
    kernel that was there before. Ids out of range raise IndexError as `gpu_embed.set_bounds_check` says.

    Not reached are the lookups in code that Inductor generates (`torch.compile`'s default backend), which has its own
    lowering of both operators; `sparse=True` gradients and the norms of `max_norm`, which are other operators; and
    bags.

    The registration is the process's: it holds for all threads, autograd's own among them, until the last block
    that is open in any thread ends. torch changes its table of kernels without a lock against running calls,
    so enter and leave while no other thread looks up.

    Raises:
        RuntimeError: this torch cannot hand out the kernel that is replaced (it has no `torch.library.get_kernel`).

    Example::

        with gpu_embed.override_aten():
            loss = model(ids).sum()
            loss.backward()
    """
    _registration.enter()
    try:
        yield
    finally:
        _registration.leave()


class _Registration:
    """The kernels that are registered while at least one block is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_blocks = 0
        self._library: torch.library.Library | None = None

    def enter(self) -> None:
        with self._lock:
            if self._open_blocks == 0:
                self._library = _register(_dispatch_keys())
            self._open_blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._open_blocks -= 1
            if self._open_blocks == 0 and self._library is not None:
                self._library._destroy()
                self._library = None


_registration = _Registration()


def _dispatch_keys() -> list[str]:
    """Where tensors lie that our kernels can take."""
    keys = []
    if torch.cuda.is_available():
        keys.append("CUDA")
    if backends.load("triton").unusable_reason(torch.device("cpu")) is None:
        keys.append("CPU")
    return keys


def _register(keys: list[str]) -> torch.library.Library:
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"gpu_embed.override_aten needs torch.library.get_kernel, which torch {torch.__version__} "
            "does not have; gpu_embed.replace_embeddings does without"
        )
    library = torch.library.Library("aten", "IMPL")
    try:
        for key in keys:
            for name, routed in (
                ("embedding", _routed_embedding),
                ("embedding_dense_backward", _routed_embedding_dense_backward),
            ):
                kernel = routed(torch.library.get_kernel(f"aten::{name}", key))
                with warnings.catch_warnings():
                    # torch warns once a process that a kernel was replaced: that is what was asked for.
                    warnings.simplefilter("ignore")
                    library.impl(name, kernel, key, with_keyset=True)
    except BaseException:
        library._destroy()
        raise
    return library


def _routed_embedding(original: Any) -> Callable[..., Tensor]:
    """The kernel of `aten::embedding`; `original` is the one that it replaces."""

    def embedding(
        keyset: torch._C.DispatchKeySet,
        weight: Tensor,
        indices: Tensor,
        padding_idx: int = -1,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if weight.dim() == 2 and _is_served(weight, indices):
            return ops.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)
        output: Tensor = original.call_boxed(
            keyset, weight, indices, padding_idx, scale_grad_by_freq, sparse
        )
        return output

    return embedding


def _routed_embedding_dense_backward(original: Any) -> Callable[..., Tensor]:
    """The kernel of `aten::embedding_dense_backward`; `original` is the one that it replaces."""

    def embedding_dense_backward(
        keyset: torch._C.DispatchKeySet,
        grad_output: Tensor,
        indices: Tensor,
        num_weights: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        arguments = (grad_output, indices, num_weights, padding_idx, scale_grad_by_freq)
        if (
            grad_output.dtype in FLOATS
            and grad_output.shape[:-1] == indices.shape
            and _is_served(grad_output, indices)
        ):
            return ops.embedding_dense_backward(*arguments)
        grad_weight: Tensor = original.call_boxed(keyset, *arguments)
        return grad_weight

    return embedding_dense_backward


def _is_served(x: Tensor, indices: Tensor) -> bool:
    """Whether the backend of x's device is one of ours, and takes ids that torch takes too.

    The torch backend calls these very operators, so it must find torch's kernels in them.
    """
    return (
        indices.dtype in (torch.int64, torch.int32)
        and indices.device == x.device
        and backends.select(x.device).name != "torch"
    )
