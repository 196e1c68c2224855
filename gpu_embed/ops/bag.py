"""The gpu_embed::embedding_bag* operators: schemas, shapes without data, gradients and vmap rules.

With F(W, p) the bags of a table W under per-sample weights p (all ones where there are none), the product of F
with a gradient g is linear in each of g, W and p. So the derivatives of each of three operators are the
other two, and they differentiate any number of times, in both directions:

    embedding_bag                          F(W, p) -> output [B, D]
    embedding_bag_dense_backward           G(g, p) -> grad_weight [V, D]
    embedding_bag_sample_weights_backward  P(g, W) -> grad_per_sample_weights, the ids' shape

`embedding_bag_max` gives the largest values and where in the table they lie. From there on it is a lookup of
single elements, so its gradient is `gpu_embed::embedding_dense_backward` of a table with one column.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from .. import backends, bounds
from ..bags import Bags, check_offsets, count_bags, make_bags
from ..dtypes import accumulation
from . import lookup as ops

# Ids are [N] with offsets, or [B, L] without. The two tensors in front are those that are differentiated.
_library = torch.library.Library("gpu_embed", "FRAGMENT")
_library.define(
    "embedding_bag(Tensor weight, Tensor? per_sample_weights, Tensor indices, Tensor? offsets, "
    "bool include_last_offset, SymInt padding_idx, str mode, bool scale_grad_by_freq, bool sparse) "
    "-> Tensor"
)
_library.define(
    "embedding_bag_dense_backward(Tensor grad_output, Tensor? per_sample_weights, Tensor indices, "
    "Tensor? offsets, bool include_last_offset, SymInt padding_idx, str mode, "
    "bool scale_grad_by_freq, SymInt num_embeddings) -> Tensor"
)
_library.define(
    "embedding_bag_sample_weights_backward(Tensor grad_output, Tensor weight, Tensor indices, "
    "Tensor? offsets, bool include_last_offset, SymInt padding_idx) -> Tensor"
)
_library.define(
    "embedding_bag_max(Tensor weight, Tensor indices, Tensor? offsets, bool include_last_offset, "
    "SymInt padding_idx, bool with_winner) -> (Tensor, Tensor)"
)
_library.define("embedding_counts(Tensor indices, SymInt num_embeddings) -> Tensor")
embedding_bag = torch.ops.gpu_embed.embedding_bag.default
embedding_bag_dense_backward = torch.ops.gpu_embed.embedding_bag_dense_backward.default
embedding_bag_sample_weights_backward = (
    torch.ops.gpu_embed.embedding_bag_sample_weights_backward.default
)
embedding_bag_max = torch.ops.gpu_embed.embedding_bag_max.default
embedding_counts = torch.ops.gpu_embed.embedding_counts.default


# Kernels: what runs below autograd, on every device.


def _look_up(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    compute: Callable[[Bags, bounds.BoundsRecord | None], Any],
) -> Any:
    """What `compute` makes of the bags, ids out of range reported; None where no bag holds anything."""
    device = weight.device
    bounds.raise_pending(device)
    if offsets is not None and offsets.device.type == "cpu":
        check_offsets(offsets, indices)
    bags = make_bags(indices, offsets, include_last_offset)
    if bags.indices.numel() == 0 or bags.num_bags == 0:
        return None
    record = bounds.record_for(device)
    output = None
    if weight.shape[1]:
        output = compute(bags, record)
    elif record is not None:
        record.write_bags(bags, weight.shape[0])
    if record is not None:
        record.finish_lookup(indices)
    return output


def _embedding_bag(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    def compute(bags: Bags, record: bounds.BoundsRecord | None) -> Tensor:
        return backends.select(weight.device).embedding_bag(
            weight, _flat(per_sample_weights), bags, padding_idx, mode, record
        )

    output = _look_up(weight, indices, offsets, include_last_offset, compute)
    if output is None:
        return _embedding_bag_fake(
            weight, None, indices, offsets, include_last_offset, -1, mode, False, False
        ).zero_()
    return output


def _embedding_bag_max(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    with_winner: bool,
) -> tuple[Tensor, Tensor]:
    def compute(bags: Bags, record: bounds.BoundsRecord | None) -> tuple[Tensor, Tensor]:
        return backends.select(weight.device).embedding_bag_max(
            weight, bags, padding_idx, with_winner, record
        )

    found = _look_up(weight, indices, offsets, include_last_offset, compute)
    if found is None:
        output, winner = _embedding_bag_max_fake(
            weight, indices, offsets, include_last_offset, -1, with_winner
        )
        return output.zero_(), winner.fill_(-1)
    return found


def _embedding_bag_dense_backward(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    bags = make_bags(indices, offsets, include_last_offset)
    if grad_output.numel() == 0 or num_embeddings == 0 or bags.indices.numel() == 0:
        return grad_output.new_zeros((num_embeddings, grad_output.shape[1]))
    return backends.select(grad_output.device).embedding_bag_dense_backward(
        grad_output,
        _flat(per_sample_weights),
        bags,
        num_embeddings,
        padding_idx,
        mode,
        scale_grad_by_freq,
    )


def _embedding_bag_sample_weights_backward(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    bags = make_bags(indices, offsets, include_last_offset)
    if grad_output.numel() == 0 or weight.numel() == 0 or bags.indices.numel() == 0:
        return grad_output.new_zeros(indices.shape)
    grad = backends.select(grad_output.device).embedding_bag_sample_weights_backward(
        grad_output, weight, bags, padding_idx
    )
    return grad.view(indices.shape)


def _embedding_counts(indices: Tensor, num_embeddings: int) -> Tensor:
    if indices.numel() == 0 or num_embeddings == 0:
        return _embedding_counts_fake(indices, num_embeddings).zero_()
    return backends.select(indices.device).embedding_counts(indices, num_embeddings)


def _flat(per_sample_weights: Tensor | None) -> Tensor | None:
    return None if per_sample_weights is None else per_sample_weights.contiguous().view(-1)


# Shapes without data.


def _embedding_bag_fake(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    bounds.prepare(weight.device)
    num_bags = count_bags(indices, offsets, include_last_offset)
    return weight.new_empty((num_bags, weight.shape[1]))


def _embedding_bag_dense_backward_fake(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
) -> Tensor:
    return grad_output.new_empty((num_embeddings, grad_output.shape[1]))


def _embedding_bag_sample_weights_backward_fake(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    return grad_output.new_empty(indices.shape)


def _embedding_bag_max_fake(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    with_winner: bool,
) -> tuple[Tensor, Tensor]:
    bounds.prepare(weight.device)
    shape = (count_bags(indices, offsets, include_last_offset), weight.shape[1])
    output = weight.new_empty(shape)
    return output, output.new_empty(shape if with_winner else (0,), dtype=torch.int64)


def _embedding_counts_fake(indices: Tensor, num_embeddings: int) -> Tensor:
    return indices.new_empty((num_embeddings,), dtype=torch.int32)


for _name, _kernel, _fake in (
    ("embedding_bag", _embedding_bag, _embedding_bag_fake),
    (
        "embedding_bag_dense_backward",
        _embedding_bag_dense_backward,
        _embedding_bag_dense_backward_fake,
    ),
    (
        "embedding_bag_sample_weights_backward",
        _embedding_bag_sample_weights_backward,
        _embedding_bag_sample_weights_backward_fake,
    ),
    ("embedding_bag_max", _embedding_bag_max, _embedding_bag_max_fake),
    ("embedding_counts", _embedding_counts, _embedding_counts_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpu_embed::{_name}", _fake, lib=_library)


# Gradients of sum and mean.


def is_plain_call(x: Tensor, y: Tensor | None, indices: Tensor, offsets: Tensor | None) -> bool:
    """Whether the dispatcher would go straight to autograd and from there to the kernel."""
    if torch.compiler.is_compiling() or not ops.is_plain_mode():
        return False
    keys = torch._C._dispatch_keys(x) | torch._C._dispatch_keys(indices)
    if y is not None:
        keys = keys | torch._C._dispatch_keys(y)
    if offsets is not None:
        keys = keys | torch._C._dispatch_keys(offsets)
    return keys.raw_repr() in ops.PLAIN_TENSORS


def below_autograd(keyset: Any, op: torch._ops.OpOverload, *inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def inside_function(keyset: Any, op: torch._ops.OpOverload, *inputs: Any) -> Any:
    """`below_autograd` for the forward of an autograd function."""
    if torch._C._are_functorch_transforms_active():
        # The levels below differentiate too, and this one has switched their modes off.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return below_autograd(keyset, op, *inputs)
    return below_autograd(keyset, op, *inputs)


def register_bilinear(
    op: torch._ops.OpOverload,
    kernel: Callable[..., Tensor],
    derivative_x: Callable[..., Tensor],
    derivative_y: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Register the gradients of an operator that is linear in each of its first two arguments.

    Args:
        op: op(x, y, indices, offsets, *arguments); y may be None.
        kernel: the same, on data.
        derivative_x: derivative_x(grad, x's rows, y, indices, offsets, *arguments) -> gradient of x.
        derivative_y: derivative_y(grad, y's rows, x, indices, offsets, *arguments) -> gradient of y.

    Returns:
        `op` as a function that spares a plain call the dispatcher.
    """
    num_arguments = len(op._schema.arguments) - 4

    # functorch hands each of its levels to the Autograd key in turn, so one level is what we differentiate.
    class Bilinear(_SingleLevelFunction):
        # torch.autograd.Function has it; compiled autograd asks for it.
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

        @staticmethod
        def forward(keyset: Any, *inputs: Any) -> Tensor:
            if keyset is None:
                return kernel(*inputs)
            return inside_function(keyset, op, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, x, y, indices, offsets, *ctx.arguments = inputs
            ctx.rows = x.shape[0], None if y is None else y.shape[0]
            _, needs_x, needs_y, *_ = ctx.needs_input_grad
            # Saved, so that autograd notices ids that were changed in place.
            ctx.save_for_backward(x if needs_y else None, y if needs_x else None, indices, offsets)
            if torch.autograd.forward_ad._current_level >= 0:
                ctx.save_for_forward(x, y, indices, offsets)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, y, indices, offsets = ctx.saved_tensors
            _, needs_x, needs_y, *_ = ctx.needs_input_grad
            grad_x = grad_y = None
            if needs_x:
                grad_x = derivative_x(grad, ctx.rows[0], y, indices, offsets, *ctx.arguments)
            if needs_y:
                grad_y = derivative_y(grad, ctx.rows[1], x, indices, offsets, *ctx.arguments)
            return (None, grad_x, grad_y, None, None, *(None,) * num_arguments)

        @staticmethod
        def jvp(
            ctx: Any, _: None, tangent_x: Tensor | None, tangent_y: Tensor | None, *rest: None
        ) -> Tensor | None:
            x, y, indices, offsets = ctx.saved_tensors
            terms = []
            if tangent_x is not None:
                terms.append(op(tangent_x, y, indices, offsets, *ctx.arguments))
            if tangent_y is not None:
                terms.append(op(x, tangent_y, indices, offsets, *ctx.arguments))
            return sum(terms[1:], terms[0]) if terms else None

    apply: Callable[..., Tensor] = Bilinear.apply  # type: ignore[attr-defined]

    def needs_gradient(x: Tensor, y: Tensor | None) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))

    def autograd(keyset: Any, x: Tensor, y: Tensor | None, *rest: Any) -> Tensor:
        if not needs_gradient(x, y) and torch.autograd.forward_ad._current_level < 0:
            return below_autograd(keyset, op, x, y, *rest)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(keyset, x, y, *rest)
        return apply(keyset, x, y, *rest)

    def call(
        x: Tensor, y: Tensor | None, indices: Tensor, offsets: Tensor | None, *arguments: Any
    ) -> Tensor:
        if not is_plain_call(x, y, indices, offsets):
            return op(x, y, indices, offsets, *arguments)
        if needs_gradient(x, y):
            return apply(None, x, y, indices, offsets, *arguments)
        return kernel(x, y, indices, offsets, *arguments)

    name = op._schema.name.removeprefix("gpu_embed::")
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return call


def _bag_by_weight(
    grad: Tensor,
    num_embeddings: int,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    if sparse:
        return _sparse_gradient(
            grad,
            per_sample_weights,
            make_bags(indices, offsets, include_last_offset),
            num_embeddings,
            padding_idx,
            mode,
            scale_grad_by_freq,
        )
    return call_embedding_bag_dense_backward(
        grad,
        per_sample_weights,
        indices,
        offsets,
        include_last_offset,
        padding_idx,
        mode,
        scale_grad_by_freq,
        num_embeddings,
    )


def _bag_by_sample_weights(
    grad: Tensor,
    _: int,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    *rest: Any,
) -> Tensor:
    return call_embedding_bag_sample_weights_backward(
        grad, weight, indices, offsets, include_last_offset, padding_idx
    )


def _dense_backward_by_grad(
    grad: Tensor,
    _: int,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
) -> Tensor:
    dtype = grad.dtype
    if scale_grad_by_freq:
        grad = _over_counts(grad, indices, offsets, include_last_offset)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(grad.dtype)
    return call_embedding_bag(
        grad,
        per_sample_weights,
        indices,
        offsets,
        include_last_offset,
        padding_idx,
        mode,
        False,
        False,
    ).to(dtype)


def _dense_backward_by_sample_weights(
    grad: Tensor,
    _: int,
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
) -> Tensor:
    dtype = grad.dtype
    if scale_grad_by_freq:
        grad = _over_counts(grad, indices, offsets, include_last_offset)
    return call_embedding_bag_sample_weights_backward(
        grad_output.to(grad.dtype), grad, indices, offsets, include_last_offset, padding_idx
    ).to(dtype)


def _sample_weights_backward_by_grad(
    grad: Tensor, _: int, weight: Tensor, *bags_and_padding: Any
) -> Tensor:
    return call_embedding_bag(weight, grad, *bags_and_padding, "sum", False, False)


def _sample_weights_backward_by_weight(
    grad: Tensor, num_embeddings: int, grad_output: Tensor, *bags_and_padding: Any
) -> Tensor:
    return call_embedding_bag_dense_backward(
        grad_output, grad, *bags_and_padding, "sum", False, num_embeddings
    )


def _over_counts(
    table: Tensor, indices: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> Tensor:
    """Each row over how often its id occurs, in the accumulation dtype."""
    if include_last_offset and offsets is not None:
        positions = torch.arange(indices.numel(), device=indices.device)
        indices = torch.where(positions < offsets[-1], indices.to(torch.int64), -1)
    counts = embedding_counts(indices, table.shape[0]).clamp(min=1)[:, None]
    return table.to(accumulation(table.dtype)) / counts


def _sparse_gradient(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    bags: Bags,
    num_embeddings: int,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
) -> Tensor:
    """torch's sparse gradient: one entry an id, as `ops.sparse_gradient` makes them."""
    bag = bags.bag_of()
    ids = torch.where(bag >= 0, bags.indices.to(torch.int64), -1)
    bag = bag.clamp(min=0)
    if mode == "mean":
        sizes = bags.sizes(padding_idx).clamp(min=1)
        wide = grad_output.to(accumulation(grad_output.dtype))
        grad_output = (wide / sizes[:, None]).to(grad_output.dtype)
    # A table without bags has no row to hand on.
    values = (
        grad_output[bag]
        if bags.num_bags
        else grad_output.new_zeros((len(bag), grad_output.shape[1]))
    )
    if per_sample_weights is not None:
        values = values * per_sample_weights.reshape(-1, 1)
    return ops.sparse_gradient(values, ids, num_embeddings, padding_idx, scale_grad_by_freq)


call_embedding_bag = register_bilinear(
    embedding_bag, _embedding_bag, _bag_by_weight, _bag_by_sample_weights
)
call_embedding_bag_dense_backward = register_bilinear(
    embedding_bag_dense_backward,
    _embedding_bag_dense_backward,
    _dense_backward_by_grad,
    _dense_backward_by_sample_weights,
)
call_embedding_bag_sample_weights_backward = register_bilinear(
    embedding_bag_sample_weights_backward,
    _embedding_bag_sample_weights_backward,
    _sample_weights_backward_by_grad,
    _sample_weights_backward_by_weight,
)


# Gradients of max.


class _Max(_SingleLevelFunction):
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        if keyset is None:
            return _embedding_bag_max(*inputs)
        return inside_function(keyset, embedding_bag_max, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, indices, offsets, *_ = inputs
        _, winner = output
        ctx.mark_non_differentiable(winner)
        ctx.weight_shape = weight.shape
        # Ids and offsets take no part, but those that were changed in place are an error, as everywhere.
        ctx.save_for_backward(winner, indices, offsets)
        if torch.autograd.forward_ad._current_level >= 0:
            ctx.save_for_forward(winner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        winner, *_ = ctx.saved_tensors
        num_embeddings, embedding_dim = ctx.weight_shape
        elements = num_embeddings * embedding_dim
        grad_weight = ops.call_embedding_dense_backward(
            grad.reshape(-1, 1), winner.view(-1), elements, -1, False
        )
        return None, grad_weight.view(ctx.weight_shape), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None, *rest: None) -> tuple[Tensor | None, None]:
        if tangent is None:
            return None, None
        (winner,) = ctx.saved_tensors
        rows = ops.embedding_dense_double_backward(
            tangent.reshape(-1, 1), winner.view(-1), -1, False
        )
        return rows.view(winner.shape), None


def _max_autograd(keyset: Any, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    if not differentiated and torch.autograd.forward_ad._current_level < 0:
        return below_autograd(keyset, embedding_bag_max, weight, *rest)
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return _apply_max(keyset, weight, *rest)
    return _apply_max(keyset, weight, *rest)


_apply_max: Callable[..., tuple[Tensor, Tensor]] = _Max.apply  # type: ignore[attr-defined]


_library.impl("embedding_bag_max", _max_autograd, "Autograd", with_keyset=True)


def call_embedding_bag_max(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """The largest values alone."""
    bags_and_padding = (indices, offsets, include_last_offset, padding_idx)
    if not is_plain_call(weight, None, indices, offsets):
        output, _ = embedding_bag_max(weight, *bags_and_padding, True)
    elif weight.requires_grad and torch.is_grad_enabled():
        output, _ = _apply_max(None, weight, *bags_and_padding, True)
    else:
        output, _ = _embedding_bag_max(weight, *bags_and_padding, False)
    return output


# vmap: one example after the other, as torch has it.


def _register_loop(op: torch._ops.OpOverload) -> None:
    def loop(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        examples = [
            op(
                *(
                    arg if dim is None else arg.select(dim, i)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(examples[0], tuple):
            return tuple(map(torch.stack, zip(*examples, strict=True))), (0,) * len(examples[0])
        return torch.stack(examples), 0

    torch.library.register_vmap(op._schema.name, loop, lib=_library)


for _op in (
    embedding_bag,
    embedding_bag_dense_backward,
    embedding_bag_sample_weights_backward,
    embedding_bag_max,
    embedding_counts,
):
    _register_loop(_op)
