"""The gpu_embed::embedding* operators: schemas, fake kernels, gradients and vmap rules.

Three of them are linear in their first argument and adjoint to one another, which is all that autograd needs
to differentiate them any number of times, in both directions:

    embedding                       weight [V, D]       -> output [..., D]
    embedding_dense_backward        grad_output [..., D] -> grad_weight [V, D]
    embedding_dense_double_backward grad [V, D]          -> [..., D], zero at padding_idx, over the counts

With a shard, those V rows are part of a larger table, which the ids are of: the numbers of `shard.Shard`. In a graph
that serves every rank its first row is a symbol, so nothing may branch on it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import backends, bounds
from ..dtypes import FLOATS
from ..shard import Shard
from .autograd import loop, register_multilinear
from .library import define, library
from .plain import PLAIN_MODES, included_keys
from .sparse import joined_gradient

# Dispatcher kernels (CompositeExplicitAutograd).


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    """weight[indices], ids out of range recorded and, where that needs no stall, reported."""
    if weight.shape[1] == 0 or indices.numel() == 0:
        num_embeddings = weight.shape[0] if shard is None else shard[1]
        compute = partial(_nothing, weight, indices, num_embeddings)
        return bounds.looked_up(weight.device, indices, compute)
    embedding = backends.select(weight.device).embedding
    compute = partial(embedding, weight, indices, -1)
    if shard is not None:
        compute = partial(compute, shard=Shard(*shard))
    return bounds.looked_up(weight.device, indices, compute)


def _nothing(
    weight: Tensor, indices: Tensor, num_embeddings: int, record: bounds.BoundsRecord | None
) -> Tensor:
    """A lookup of no ids, or in a table without columns."""
    if record is not None:
        record.write(indices, num_embeddings)
    return weight.new_empty(*indices.shape, weight.shape[1])


def _embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    dtype = grad_output.dtype
    if dtype.is_complex:
        parts = torch.view_as_real(grad_output).flatten(-2)
        grad_weight = _embedding_dense_backward(
            parts, indices, num_embeddings, padding_idx, scale_grad_by_freq, shard
        )
        return torch.view_as_complex(grad_weight.unflatten(-1, (-1, 2)))
    if dtype not in FLOATS:
        name = str(dtype).removeprefix("torch.").capitalize()
        raise NotImplementedError(f"\"embedding_backward\" not implemented for '{name}'")
    if grad_output.numel() == 0 or num_embeddings == 0:
        if into is not None:
            return into
        return grad_output.new_zeros((num_embeddings, grad_output.shape[-1]))
    return backends.select(grad_output.device).embedding_dense_backward(
        grad_output,
        indices,
        num_embeddings,
        padding_idx,
        scale_grad_by_freq,
        into,
        None if shard is None else Shard(*shard),
    )


def _embedding_dense_double_backward(
    grad: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bounds.raise_pending(grad.device)
    shape = (*indices.shape, grad.shape[1])
    if indices.numel() == 0 or grad.shape[1] == 0:
        return grad.new_empty(shape)
    backend, rows = backends.select(grad.device), None if shard is None else Shard(*shard)
    output = backend.embedding(grad, indices, padding_idx, None, rows)
    if scale_grad_by_freq:
        counts = backend.embedding_counts(indices, grad.shape[0], rows)
        # Looked up by the same kernel: it alone can be trusted with an id out of range.
        output /= backend.embedding(counts[:, None], indices, -1, None, rows).clamp_(min=1)
    return output


def _embedding_renorm_(
    weight: Tensor,
    indices: Tensor,
    max_norm: float,
    norm_type: float,
    shard: Sequence[int] | None = None,
) -> None:
    bounds.raise_pending(weight.device)
    if indices.numel() and weight.numel():
        backend = backends.select(weight.device)
        if weight.dtype not in FLOATS:
            # No kernel of ours has the norm of complex numbers; torch decides on the rest.
            backend = backends.load("torch")
        backend.embedding_renorm_(
            weight, indices, max_norm, norm_type, None if shard is None else Shard(*shard)
        )


# Fake kernels.


def _embedding_fake(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bounds.prepare(weight.device)
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _embedding_dense_backward_fake(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return grad_output.new_empty((num_embeddings, grad_output.shape[-1]))


def _embedding_dense_double_backward_fake(
    grad: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return grad.new_empty((*indices.shape, grad.shape[1]))


def _embedding_renorm_fake(
    weight: Tensor,
    indices: Tensor,
    max_norm: float,
    norm_type: float,
    shard: Sequence[int] | None = None,
) -> None:
    return None


embedding = define(
    "embedding(Tensor weight, Tensor indices, SymInt padding_idx, bool scale_grad_by_freq, bool sparse, "
    "SymInt[]? shard=None) -> Tensor",
    _embedding,
    _embedding_fake,
)
embedding_dense_backward = define(
    "embedding_dense_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, SymInt padding_idx, "
    "bool scale_grad_by_freq, SymInt[]? shard=None) -> Tensor",
    _embedding_dense_backward,
    _embedding_dense_backward_fake,
)
embedding_dense_double_backward = define(
    "embedding_dense_double_backward(Tensor grad, Tensor indices, SymInt padding_idx, "
    "bool scale_grad_by_freq, SymInt[]? shard=None) -> Tensor",
    _embedding_dense_double_backward,
    _embedding_dense_double_backward_fake,
)
embedding_renorm_ = define(
    "embedding_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type, "
    "SymInt[]? shard=None) -> ()",
    _embedding_renorm_,
    _embedding_renorm_fake,
)


# Gradients.


def embedding_adjoint(
    grad: Tensor,
    num_embeddings: int,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    if sparse:
        if shard is not None:
            indices = Shard(*shard).local(indices, num_embeddings, padding_idx)
            padding_idx = num_embeddings
        return sparse_gradient(grad, indices, num_embeddings, padding_idx, scale_grad_by_freq)
    inputs = grad, indices, num_embeddings, padding_idx, scale_grad_by_freq, shard
    if into is not None:
        return _embedding_dense_backward(*inputs, into)
    return call_embedding_dense_backward(*inputs)


def _embedding_dense_backward_adjoint(
    grad: Tensor,
    _: int,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return call_embedding_dense_double_backward(
        grad, indices, padding_idx, scale_grad_by_freq, shard
    )


def _embedding_dense_double_backward_adjoint(
    grad: Tensor,
    num_embeddings: int,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return call_embedding_dense_backward(
        grad, indices, num_embeddings, padding_idx, scale_grad_by_freq, shard
    )


def sparse_gradient(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    is_new: bool = False,
    spare: Tensor | None = None,
) -> Tensor:
    """torch's sparse gradient: COO, int64 ids in input order, duplicates kept, padding dropped.

    Differentiable, since it is made of torch's own operators. Ids out of range are dropped, too; on CUDA, where
    dropping would wait for the GPU, both become zeros, and in a graph ids out of range do.

    It has memory of its own, so that the optimizer finds what the backward has left, but where it is applied at once.

    Args:
        is_new: whether grad_output and indices belong to nobody else.
        spare: int64 [], the row that has zeros if no entry is kept; None: row 0.
    """
    if scale_grad_by_freq:
        raise RuntimeError(
            "embedding_backward: scale_grad_by_freq not supported with sparse gradients"
        )
    bounds.raise_pending(grad_output.device)
    ids = indices.reshape(-1).to(torch.int64)
    values = grad_output.reshape(ids.numel(), grad_output.shape[-1])
    if num_embeddings == 0 or ids.numel() == 0:
        ids, values = ids[:0], values[:0]
    elif ids.device.type == "cpu" and (padding_idx >= 0 or type(ids) is Tensor):
        # Of a fake tensor nobody knows how many are kept, and a tracer wants what holds for other ids too.
        is_plain = included_keys().raw_repr() in PLAIN_MODES
        if padding_idx >= 0 or not is_plain or not bounds.all_in_table(ids, num_embeddings):
            kept = _kept(ids, num_embeddings, padding_idx).nonzero()[:, 0]
            ids, values = ids.index_select(0, kept), values.index_select(0, kept)
        elif is_new or _is_applied_at_once():
            values = values.contiguous()
        else:
            ids, values = ids.clone(), values.clone(memory_format=torch.contiguous_format)
    else:
        ids, values = _zeroed(ids, values, _kept(ids, num_embeddings, padding_idx), spare)
    # In a graph; but that operator has no derivative, and with create_graph torch's makes the tensor.
    if (type(values) is not Tensor or is_compiling()) and not torch.is_grad_enabled():
        return joined_gradient([(ids, values)], num_embeddings)
    size = (num_embeddings, grad_output.shape[-1])
    return torch.sparse_coo_tensor(
        ids[None], values, size, device=values.device, check_invariants=False
    )


def _kept(ids: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    kept = bounds.in_table(ids, num_embeddings)
    return kept & (ids != padding_idx) if padding_idx >= 0 else kept


def _is_applied_at_once() -> bool:
    """Whether the gradient of the node that runs goes to a table that reads it in this backward, and nowhere else."""
    try:
        leaf: Any = torch._C._current_autograd_node().next_functions[0][0]
        owners = [
            getattr(hook, "__self__", None) for hook in leaf.variable._backward_hooks.values()
        ]
        if [getattr(owner, "applies_at_once", False) for owner in owners] != [True]:
            return False
        # Raises where torch.autograd.grad hands it to the caller.
        return bool(torch._C._will_engine_execute_node(leaf))
    except (AttributeError, RuntimeError):
        # No node, no leaf, no hooks; or a torch without these private functions.
        return False


def _zeroed(
    ids: Tensor, values: Tensor, kept: Tensor, spare: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The entries that are not kept become zeros for a row that a kept one names; the host sees no data.

    So no other row has an entry, which an optimizer would take for a gradient. If none is kept, row 0 has, or
    the spare one.
    """
    named = torch.where(kept, ids, 0).amax()
    if spare is not None:
        named = torch.where(kept.any(), named, spare)
    return torch.where(kept, ids, named), torch.where(kept[:, None], values, 0)


call_embedding = register_multilinear(embedding, _embedding, embedding_adjoint, of_table=True)
call_embedding_dense_backward = register_multilinear(
    embedding_dense_backward, _embedding_dense_backward, _embedding_dense_backward_adjoint
)
call_embedding_dense_double_backward = register_multilinear(
    embedding_dense_double_backward,
    _embedding_dense_double_backward,
    _embedding_dense_double_backward_adjoint,
)


def _renorm_in_place(keyset: Any, weight: Tensor, *arguments: Any) -> None:
    torch.autograd.graph.increment_version(weight)
    embedding_renorm_.redispatch(
        keyset & torch._C._after_ADInplaceOrView_keyset, weight, *arguments
    )


library.impl("embedding_renorm_", _renorm_in_place, "ADInplaceOrView", with_keyset=True)


# vmap: B tables are one table of B * V rows, in which example b's ids are shifted by b * V. Shards: a loop.


def _register_vmap(op: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], None]:
    """Register a rule for whole tables."""

    def register(rule: Callable[..., Any]) -> None:
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            has_shard = len(args) == len(op._schema.arguments)
            return loop(op, info, in_dims, *args) if has_shard else rule(info, in_dims, *args)

        torch.library.register_vmap(op._schema.name, vmap, lib=library)

    return register


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with its vmapped dimension in front, made by expansion if it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _shifted(indices: Tensor, num_embeddings: int, dropped_idx: int) -> Tensor:
    """Ids [B, ...] into the stacked tables; ids out of range and dropped_idx become -1."""
    indices = indices.to(torch.int64)
    shift = torch.arange(len(indices), device=indices.device) * num_embeddings
    shift = shift.view(-1, *[1] * (indices.dim() - 1))
    kept = bounds.in_table(indices, num_embeddings) & (indices != dropped_idx)
    return torch.where(kept, indices + shift, -1)


@_register_vmap(embedding)
def _embedding_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> tuple[Tensor, int]:
    # With scale_grad_by_freq each example counts its own ids, so each needs rows of its own.
    if in_dims[0] is None and not scale_grad_by_freq:
        indices = _batched(indices, in_dims[1], info.batch_size)
        return embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse), 0
    weight = _batched(weight, in_dims[0], info.batch_size)
    indices = _batched(indices, in_dims[1], info.batch_size)
    num_embeddings = weight.shape[1]
    # Reports ids out of range as the caller wrote them; there is nothing to read in a table without columns.
    embedding(weight.new_empty((num_embeddings, 0)), indices, -1, False, False)
    shifted = _shifted(indices, num_embeddings, -1)
    output = embedding(weight.flatten(0, 1), shifted, -1, scale_grad_by_freq, sparse)
    if padding_idx >= 0:
        output = torch.where((indices == padding_idx)[..., None], output.detach(), output)
    return output, 0


@_register_vmap(embedding_dense_backward)
def _embedding_dense_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, int]:
    grad_output = _batched(grad_output, in_dims[0], info.batch_size)
    if in_dims[1] is None:
        # One set of ids: the examples lie side by side in one wider row.
        wide = grad_output.movedim(0, -2).flatten(-2)
        grad_weight = embedding_dense_backward(
            wide, indices, num_embeddings, padding_idx, scale_grad_by_freq
        )
        return grad_weight.unflatten(1, (info.batch_size, grad_output.shape[-1])), 1
    indices = indices.movedim(in_dims[1], 0)
    grad_weight = embedding_dense_backward(
        grad_output,
        _shifted(indices, num_embeddings, padding_idx),
        info.batch_size * num_embeddings,
        -1,
        scale_grad_by_freq,
    )
    return grad_weight.unflatten(0, (info.batch_size, num_embeddings)), 0


@_register_vmap(embedding_dense_double_backward)
def _embedding_dense_double_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    indices: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, int]:
    grad = _batched(grad, in_dims[0], info.batch_size)
    indices = _batched(indices, in_dims[1], info.batch_size)
    shifted = _shifted(indices, grad.shape[1], padding_idx)
    output = embedding_dense_double_backward(grad.flatten(0, 1), shifted, -1, scale_grad_by_freq)
    return output, 0


@torch.library.register_vmap("gpu_embed::embedding_renorm_", lib=library)
def _embedding_renorm_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    indices: Tensor,
    max_norm: float,
    norm_type: float,
    shard: Sequence[int] | None = None,
) -> tuple[None, None]:
    if in_dims[0] is None:
        embedding_renorm_(weight, indices, max_norm, norm_type, shard)
        return None, None
    examples = _batched(indices, in_dims[1], info.batch_size)
    for table, ids in zip(weight.movedim(in_dims[0], 0), examples, strict=True):
        embedding_renorm_(table, ids, max_norm, norm_type, shard)
    return None, None
