"""Which weights add their gradient to the `.grad` that they have, and whether one backward may.

`accumulate_in_place` marks a leaf. In backward its gradient is added to its `.grad` where nobody can tell that from
autograd's own addition. Wherever somebody might, the gradient is returned, as without the mark.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import settings
from ..dtypes import FLOATS, accumulation
from .plain import PLAIN_MODES, PLAIN_TENSORS, included_keys

# The attribute of a marked leaf: like a hook it goes where the Python object goes, and is neither copied nor saved.
_MARK = "_gpu_embed_in_place"
# Handles in force, by id. Where there is none, nothing else is asked.
_in_force: set[int] = set()
# Two threads may run backward through one leaf: autograd holds such a lock around its own addition.
_adding = threading.Lock()
_AccumulateGrad = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class Handles(list["Handle"]):
    """The handles that marked a leaf."""

    def __reduce__(self) -> Any:
        # As torch saves hooks: none.
        return OrderedDict, ()


class Handle:
    """The end of a mark. Marked leaves hold their handles, and a handle holds no leaf."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        _engine_support()  # not in the midst of a backward
        for leaf in leaves:
            others = [other for other in getattr(leaf, _MARK, ()) if id(other) in _in_force]
            setattr(leaf, _MARK, Handles([*others, self]))
        _in_force.add(id(self))
        settings.changed()

    def remove(self) -> None:
        """Return gradients to autograd again, unless another handle holds. May be called twice."""
        if id(self) in _in_force:
            _in_force.discard(id(self))
            settings.changed()

    def __del__(self) -> None:
        _in_force.discard(id(self))


def is_marked(leaf: Tensor) -> bool:
    """Whether a handle in force marked it."""
    if _in_force:
        for handle in getattr(leaf, _MARK, ()):
            if id(handle) in _in_force:
                return True
    return False


def weight_gradient(
    ctx: Any,
    shape: torch.Size,
    derivative: Callable[..., Tensor],
    grad_output: Tensor,
    *inputs: Any,
) -> Tensor | None:
    """The gradient that a Function's backward returns for its first tensor, the weight.

    Args:
        ctx: of the Function.
        shape: the weight's in the forward.
        derivative: derivative(grad_output, *inputs, into=None) -> gradient of the weight. Given the weight's `.grad` as
            `into`, it adds to that and returns it, or it returns a gradient all the same.

    Returns:
        None where the gradient was added to the weight's `.grad`.
    """
    if _in_force and not torch.compiler.is_compiling():
        with _adding:
            into = _gradient_to_add_to(ctx.next_functions[0][0], shape, grad_output)
            if into is not None:
                gradient = derivative(grad_output, *inputs, into=into)
                if gradient is not into:
                    return gradient
                torch.autograd.graph.increment_version(into)
                return None
    return derivative(grad_output, *inputs)


def _gradient_to_add_to(node: Any, shape: torch.Size, grad_output: Tensor) -> Tensor | None:
    """The `.grad` of a marked leaf if nobody can tell an addition in place from autograd's.

    Args:
        node: where autograd would send the gradient.
        shape: the leaf's in the forward.
    """
    # Without a node that adds to a leaf: views, functions of a weight, functorch's levels.
    if type(node) is not _AccumulateGrad or not is_marked(node.variable):
        return None
    leaf, into = node.variable, node.variable.grad
    dtype = grad_output.dtype
    if (
        type(into) is not Tensor
        or torch.is_grad_enabled()  # create_graph
        or into.requires_grad
        or included_keys().raw_repr() not in PLAIN_MODES
        or forward_ad._current_level >= 0
        or not _are_plain(into, grad_output)
        or dtype not in FLOATS
        or (into.dtype is not dtype and into.dtype is not accumulation(dtype))
        or into.shape != shape
        or into.get_device() != grad_output.get_device()
        or not _has_no_overlap(into)
        or leaf._backward_hooks  # which see the gradient
    ):
        return None
    engine = _engine_support()
    if not engine.runs_hooks and leaf._post_accumulate_grad_hooks:
        return None
    if not engine.tells or not _will_add(node):
        return None
    if into.is_cuda:
        _join_streams(node, into.device)
    return into


def _are_plain(into: Tensor, grad_output: Tensor) -> bool:
    keys = torch._C._dispatch_keys(into) | torch._C._dispatch_keys(grad_output)
    return keys.raw_repr() in PLAIN_TENSORS


def _has_no_overlap(gradient: Tensor) -> bool:
    if gradient.is_contiguous():
        return True
    if gradient.dim() != 2:
        return False
    (rows, columns), (row, column) = gradient.shape, gradient.stride()
    return 0 < column * columns <= row or 0 < row * rows <= column


def _will_add(node: Any) -> bool:
    """Whether this backward adds to the leaf; False where `torch.autograd.grad` or a call of its own asks for it."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


class EngineSupport(NamedTuple):
    """What autograd's engine does in this version of torch."""

    tells: bool  # whether it runs a node; a private function
    runs_hooks: bool  # post-accumulate hooks of a leaf that gets None


@cache
def _engine_support() -> EngineSupport:
    told: list[bool] = []
    hooks: list[Tensor] = []

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, leaf: Tensor) -> Tensor:
            return leaf.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            told.append(_will_add(ctx.next_functions[0][0]))

    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        leaf.register_post_accumulate_grad_hook(hooks.append)
        with contextlib.suppress(AttributeError):
            Nothing.apply(leaf).backward()
    return EngineSupport(told == [True], len(hooks) == 1)


def _join_streams(node: Any, device: torch.device) -> None:
    """Order what this stream adds with other additions, autograd's among them, that may run on other streams."""
    last: list[Any] | None = node.metadata.get(_MARK)
    if last is None:
        last = node.metadata[_MARK] = []
        node.register_prehook(partial(_wait_for_last, last, device))
    _wait_for_last(last, device)
    last.append(torch.cuda.current_stream(device))


def _wait_for_last(last: list[Any], device: torch.device, _: Any = None) -> None:
    """Let the current stream wait for the one that added last in this backward, if it is another."""
    stream = torch.cuda.current_stream(device)
    if last and last[0] != stream:
        stream.wait_stream(last[0])
    last.clear()
