"""Which weights add their gradient to the `.grad` that they have, and whether one backward may.

`accumulate_in_place` marks a leaf. In backward its gradient is added to its `.grad` where nobody can tell that from
autograd's own addition. Wherever somebody might, the gradient is returned, as without the mark.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import settings
from ..dtypes import FLOATS, accumulation
from ..forkable_lock import forkable_lock

# The attribute of a marked leaf: like a hook it goes where the Python object goes, and is neither copied nor saved.
_MARK = "_gpu_embed_in_place"
# Handles in force, by id. Where there is none, no backward calls `weight_gradient`.
in_force: set[int] = set()
# Two threads may run backward through one leaf: autograd holds such a lock around its own addition.
_adding = forkable_lock()
_AccumulateGrad = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
_is_grad_enabled = torch.is_grad_enabled
_is_anomaly_enabled = torch.is_anomaly_enabled
_strided = torch.strided
_num_modes = torch._C._len_torch_dispatch_stack
_has_transforms = torch._C._are_functorch_transforms_active
_will_execute: Any = getattr(torch._C, "_will_engine_execute_node", None)


class Handles(list["Handle"]):
    """The handles that marked a leaf."""

    def __reduce__(self) -> Any:
        # As torch saves hooks: none.
        return OrderedDict, ()


class Handle:
    """The end of a mark. Marked leaves hold their handles, and a handle holds no leaf."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        for leaf in leaves:
            others = [other for other in getattr(leaf, _MARK, ()) if id(other) in in_force]
            setattr(leaf, _MARK, Handles([*others, self]))
        # Without that private function every gradient is returned.
        if _engine().tells:
            in_force.add(id(self))
        settings.changed()

    def remove(self) -> None:
        """Return gradients to autograd again, unless another handle holds. May be called twice."""
        in_force.discard(id(self))
        settings.changed()

    # An argument, since at the interpreter's exit the module may have lost its names.
    def __del__(self, discard: Callable[[int], None] = in_force.discard) -> None:
        discard(id(self))


def is_marked(leaf: Tensor) -> bool:
    """Whether a handle in force marked it."""
    # A loop, since every backward asks: any(...) takes three times as long.
    for handle in getattr(leaf, _MARK, ()):  # noqa: SIM110
        if id(handle) in in_force:
            return True
    return False


def is_of_marked(ctx: Any) -> bool:
    """Whether the first tensor of this Function is a marked leaf, in eager mode."""
    if is_compiling():
        return False
    node = ctx.next_functions[0][0]
    # Without a node that adds to a leaf: views, functions of a weight, functorch's levels.
    return type(node) is _AccumulateGrad and is_marked(node.variable)


def weight_gradient(
    ctx: Any,
    shape: torch.Size,
    derivative: Callable[..., Tensor],
    grad_output: Tensor,
    *inputs: Any,
) -> Tensor | None:
    """The gradient that a Function's backward returns for its first tensor, a weight.

    Args:
        ctx: of the Function, for which `is_of_marked` holds.
        shape: the weight's in the forward.
        derivative: derivative(grad_output, *inputs, into=None) -> gradient of the weight. Given the weight's `.grad` as
            `into`, it adds to that and returns it, or it returns a gradient all the same.

    Returns:
        None where the gradient was added to the weight's `.grad`.
    """
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
    """The `.grad` of a leaf if nobody can tell an addition in place from autograd's.

    Args:
        node: the leaf's, which is to add the gradient.
        shape: the leaf's in the forward.
    """
    leaf = node.variable
    # That of the gradient: of grad_output, or where a table's output has a dtype of its own, of the table.
    into, dtype = leaf.grad, leaf.dtype
    if (
        type(into) is not Tensor
        or type(grad_output) is not Tensor
        or _is_grad_enabled()  # create_graph
        or _is_anomaly_enabled()  # looks for NaN in what a node returns
        or into.requires_grad
        or not leaf.requires_grad
        or leaf._backward_hooks  # which see the gradient
        or into.layout is not _strided
        or (into.dtype is not dtype and into.dtype is not accumulation(dtype))
        or dtype not in FLOATS
        or into.shape != shape
        or not (into.is_contiguous() or _is_without_overlap(into))
        # What stands for other data, and modes that watch operators.
        or grad_output.is_neg()
        or grad_output._is_zerotensor()
        or _num_modes()
        or _has_transforms()
        or forward_ad._current_level >= 0
        or (leaf._post_accumulate_grad_hooks and not _engine().runs_hooks)
    ):
        return None
    try:
        # Raises where `torch.autograd.grad` asks for the leaf's gradient, or a caller for this node alone.
        if not _will_execute(node):
            return None
    except RuntimeError:
        return None
    if into.untyped_storage().data_ptr() == grad_output.untyped_storage().data_ptr():
        return None
    if into.is_cuda or grad_output.is_cuda:
        if into.device != grad_output.device:
            return None
        _join_streams(node, into.device)
    return into


def _is_without_overlap(gradient: Tensor) -> bool:
    """Whether each element has memory of its own, for two dimensions that show it; False where they do not."""
    if gradient.dim() != 2 or gradient.is_neg():
        return False
    (rows, columns), (row, column) = gradient.shape, gradient.stride()
    return 0 < column * columns <= row or 0 < row * rows <= column


class Engine(NamedTuple):
    """What autograd's engine does in this version of torch."""

    tells: bool  # whether it runs a node; a private function
    runs_hooks: bool  # post-accumulate hooks of a leaf that gets None


@cache
def _engine() -> Engine:
    told: list[bool] = []
    hooks: list[Tensor] = []

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, leaf: Tensor) -> Tensor:
            return leaf.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            told.append(_will_execute is not None and _will_execute(ctx.next_functions[0][0]))

    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        leaf.register_post_accumulate_grad_hook(hooks.append)
        Nothing.apply(leaf).backward()
    return Engine(told == [True], len(hooks) == 1)


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
