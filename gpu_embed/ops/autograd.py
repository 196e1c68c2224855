"""What our operators share: their way past the dispatcher, and the gradients of two kinds of them.

An operator is registered with the dispatcher, and has a function `call_*` that goes past the dispatcher where that
has nothing to do: plain tensors in eager mode, the common case, in a third of the host time.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from . import in_place, sparse
from .library import library
from .plain import is_plain_call

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def below_autograd(keyset: Any, op: torch._ops.OpOverload, *inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def inside_function(keyset: Any, op: torch._ops.OpOverload, *inputs: Any) -> Any:
    """`below_autograd` for the forward of an autograd function."""
    if torch._C._are_functorch_transforms_active():
        # The levels below differentiate too, and this one has switched their modes off.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return below_autograd(keyset, op, *inputs)
    # A result that is a slice of what a kernel allocated is no view to forward mode, which would refuse its tangent.
    with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        return below_autograd(keyset, op, *inputs)


# functorch hands each of its levels to the Autograd key in turn, so one level is what we differentiate.
class SingleLevelFunction(_SingleLevelFunction):
    """The part of torch.autograd.Function that our gradients need."""

    # torch.autograd.Function has it; compiled autograd asks for it.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def register_multilinear(
    op: torch._ops.OpOverload,
    kernel: Callable[..., Tensor],
    *derivatives: Callable[..., Tensor],
    constants: int = 0,
    of_table: bool = False,
) -> Callable[..., Tensor]:
    """Register the gradients of an operator that is linear in each of its first arguments.

    Args:
        op: op(*linear, *tensors, *arguments); those tensors, and all linear ones but the first, may be None.
        kernel: the same, on data.
        derivatives: one for each of `linear`: derivative(grad, that one's rows, *the other linear ones, *tensors,
            *arguments) -> its gradient.
        constants: how many of the last tensors never change: they are not saved, and hooks do not see them.
        of_table: the first input is a table, whose derivative also takes `into`: see `in_place.weight_gradient`.

    Returns:
        `op` as a function that spares a plain call the dispatcher.
    """
    count, num_inputs = len(derivatives), len(op._schema.arguments)
    end = _num_tensors(op) - constants

    class Multilinear(SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
            linear, tensors, ctx.arguments = inputs[:count], inputs[count:end], inputs[end:]
            ctx.shapes = [None if x is None else x.shape for x in linear]
            needs = ctx.needs_input_grad[1 : count + 1]
            # Each is needed for the others' gradients. Ids too are saved, so that autograd notices if they change.
            others = [x if sum(needs) > need else None for x, need in zip(linear, needs)]  # noqa: B905
            ctx.save_for_backward(*others, *tensors)
            if forward_ad._current_level >= 0:
                ctx.save_for_forward(*(linear if count > 1 else others), *tensors)
            return run(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: a checkpoint unpacks no tensor twice
            linear, tensors = saved[:count], saved[count:]
            grads: list[Tensor | None] = [None] * (num_inputs + 1)
            is_marked = of_table and in_place.in_force and in_place.is_of_marked(ctx)
            for i, derivative in enumerate(derivatives):
                if ctx.needs_input_grad[i + 1]:
                    shape, others = ctx.shapes[i], (*linear[:i], *linear[i + 1 :])
                    inputs = (grad, shape[0], *others, *tensors, *ctx.arguments)
                    if i == 0 and is_marked:
                        grads[1] = in_place.weight_gradient(ctx, shape, derivative, *inputs)
                    else:
                        grads[i + 1] = derivative(*inputs)
            return tuple(grads)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor | None:
            saved = ctx.saved_tensors  # once: a checkpoint unpacks no tensor twice
            linear, tensors = saved[:count], saved[count:]
            terms = [
                op(*linear[:i], tangent, *linear[i + 1 :], *tensors, *ctx.arguments)
                for i, tangent in enumerate(tangents[:count])
                if tangent is not None
            ]
            return sum(terms[1:], terms[0]) if terms else None

    function = _named(Multilinear, op)
    apply: Callable[..., Tensor] = function.apply
    _register_autograd(op, function, count)

    def call(*inputs: Any) -> Tensor:
        if not is_plain_call(*inputs[:end]):
            output: Tensor = op(*inputs)
            return output
        if torch.is_grad_enabled():
            for x in inputs[:count]:
                if x is not None and x.requires_grad:
                    return apply(kernel, *inputs)
        return kernel(*inputs)

    return call


def register_argmax(
    op: torch._ops.OpOverload,
    kernel: Callable[..., tuple[Tensor, Tensor]],
    adjoint: Callable[..., Tensor],
    at_argmax: Callable[..., Tensor],
    constants: int = 0,
) -> Callable[..., Tensor]:
    """Register the gradients of an operator that takes maxima: with the argmax fixed, it is linear in the weight.

    Args:
        op: op(weight, *tensors, *arguments, with_argmax) -> (output, argmax); tensors may be None.
        kernel: the same, on data.
        adjoint: adjoint(grad, weight's shape, argmax, *tensors, *arguments, into=None) -> gradient of the weight;
            for `into` see `in_place.weight_gradient`.
        at_argmax: at_argmax(weight, argmax, *tensors, *arguments) -> what the maxima are taken from.
        constants: how many of the last tensors never change: they are not saved, and hooks do not see them.

    Returns:
        `op` but for its last argument, as a function that spares a plain call the dispatcher; the output alone.
    """
    end, num_inputs = _num_tensors(op) - constants, len(op._schema.arguments)

    class Argmax(SingleLevelFunction):
        @staticmethod
        def forward(
            ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], *inputs: Any
        ) -> tuple[Tensor, Tensor]:
            output, argmax = run(*inputs)
            ctx.mark_non_differentiable(argmax)
            ctx.weight_shape, ctx.arguments = inputs[0].shape, inputs[end:-1]
            # Ids too, so that autograd notices those that were changed in place.
            ctx.save_for_backward(argmax, *inputs[1:end])
            if forward_ad._current_level >= 0:
                ctx.save_for_forward(argmax, *inputs[1:end])
            return output, argmax

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
            shape = ctx.weight_shape
            inputs = (grad, shape, *ctx.saved_tensors, *ctx.arguments)
            if in_place.in_force and in_place.is_of_marked(ctx):
                grad_weight = in_place.weight_gradient(ctx, shape, adjoint, *inputs)
            else:
                grad_weight = adjoint(*inputs)
            return None, grad_weight, *(None,) * (num_inputs - 1)

        @staticmethod
        def jvp(
            ctx: Any, _: None, tangent: Tensor | None, *rest: None
        ) -> tuple[Tensor | None, None]:
            if tangent is None:
                return None, None
            return at_argmax(tangent, *ctx.saved_tensors, *ctx.arguments), None

    function = _named(Argmax, op)
    apply: Callable[..., tuple[Tensor, Tensor]] = function.apply
    _register_autograd(op, function, 1)

    def call(*inputs: Any) -> Tensor:
        if not is_plain_call(*inputs[:end]):
            output, _ = op(*inputs, True)
        elif inputs[0].requires_grad and torch.is_grad_enabled():
            output, _ = apply(kernel, *inputs, True)
        else:
            output, _ = kernel(*inputs, False)
        return output

    return call


def _named(function: type[SingleLevelFunction], op: torch._ops.OpOverload) -> Any:
    """The autograd function under the operator's name, which profiles, traces and `grad_fn` show."""
    name = op._schema.name.removeprefix("gpu_embed::").title().replace("_", "")
    return types.new_class(name, (function,))


def _num_tensors(op: torch._ops.OpOverload) -> int:
    """How many of its first arguments are tensors."""
    return sum("Tensor" in str(argument.type) for argument in op._schema.arguments)


def _register_autograd(op: torch._ops.OpOverload, function: type[Any], num_linear: int) -> None:
    """Differentiate an operator with an autograd function whose first argument is what to run."""

    names = [argument.name for argument in op._schema.arguments]
    sparse_at = names.index("sparse") if "sparse" in names else None
    apply, apply_linked = function.apply, sparse.linked(function)

    def autograd(keyset: Any, *inputs: Any) -> Any:
        differentiated = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in inputs[:num_linear]
        )
        if not differentiated and forward_ad._current_level < 0:
            return below_autograd(keyset, op, *inputs)
        run = partial(inside_function, keyset, op)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(run, *inputs)
        if sparse_at is not None and inputs[sparse_at] and sparse.is_traced(inputs[0]):
            return apply_linked(run, *inputs)
        return apply(run, *inputs)

    name = op._schema.name.removeprefix("gpu_embed::")
    library.impl(name, autograd, "Autograd", with_keyset=True)


def register_loop(op: torch._ops.OpOverload) -> None:
    """vmap: one example after the other, as torch has it for its bags."""
    torch.library.register_vmap(op._schema.name, partial(loop, op), lib=library)


def loop(
    op: torch._ops.OpOverload, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """A rule for vmap that calls the operator for each example."""
    examples = [
        op(
            *(
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(examples[0], tuple):
        return tuple(map(torch.stack, zip(*examples, strict=True))), (0,) * len(examples[0])
    return torch.stack(examples), 0
