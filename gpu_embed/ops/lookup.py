"""The gpu_embed::* operators: schemas, shapes without data, gradients and vmap rules.

Three of them are linear in their first argument and adjoint to one another, which is all that autograd needs
to differentiate them any number of times, in both directions:

    embedding                       weight [V, D]       -> output [..., D]
    embedding_dense_backward        grad_output [..., D] -> grad_weight [V, D]
    embedding_dense_double_backward grad [V, D]          -> [..., D], zero at padding_idx, over the counts

Each is registered with the dispatcher, and has a function `call_*` that goes past the dispatcher where that has
nothing to do: plain tensors in eager mode, the common case, in a third of the host time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from .. import backends, bounds
from ..dtypes import FLOATS
from .known import KnownTable, look_up

_library = torch.library.Library("gpu_embed", "DEF")
_library.define(
    "embedding(Tensor weight, Tensor indices, SymInt padding_idx, "
    "bool scale_grad_by_freq, bool sparse) -> Tensor"
)
_library.define(
    "embedding_dense_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, "
    "SymInt padding_idx, bool scale_grad_by_freq) -> Tensor"
)
_library.define(
    "embedding_dense_double_backward(Tensor grad, Tensor indices, "
    "SymInt padding_idx, bool scale_grad_by_freq) -> Tensor"
)
_library.define(
    "embedding_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type) -> ()"
)
embedding = torch.ops.gpu_embed.embedding.default
embedding_dense_backward = torch.ops.gpu_embed.embedding_dense_backward.default
embedding_dense_double_backward = torch.ops.gpu_embed.embedding_dense_double_backward.default
embedding_renorm_ = torch.ops.gpu_embed.embedding_renorm_.default


# Kernels: what runs below autograd, on every device.


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    return look_up(weight, indices)


def _embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    dtype = grad_output.dtype
    if dtype.is_complex:
        parts = torch.view_as_real(grad_output).flatten(-2)
        grad_weight = _embedding_dense_backward(
            parts, indices, num_embeddings, padding_idx, scale_grad_by_freq
        )
        return torch.view_as_complex(grad_weight.unflatten(-1, (-1, 2)))
    if dtype not in FLOATS:
        name = str(dtype).removeprefix("torch.").capitalize()
        raise NotImplementedError(f"\"embedding_backward\" not implemented for '{name}'")
    if grad_output.numel() == 0 or num_embeddings == 0:
        return grad_output.new_zeros((num_embeddings, grad_output.shape[-1]))
    return backends.select(grad_output.device).embedding_dense_backward(
        grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq
    )


def _embedding_dense_double_backward(
    grad: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    bounds.raise_pending(grad.device)
    shape = (*indices.shape, grad.shape[1])
    if indices.numel() == 0 or grad.shape[1] == 0:
        return grad.new_empty(shape)
    backend = backends.select(grad.device)
    output = backend.embedding(grad, indices, padding_idx, None)
    if scale_grad_by_freq:
        counts = backend.embedding_counts(indices, grad.shape[0])
        # Looked up by the same kernel: it alone can be trusted with an id out of range.
        output /= backend.embedding(counts[:, None], indices, -1, None).clamp_(min=1)
    return output


def _embedding_renorm_(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    bounds.raise_pending(weight.device)
    if indices.numel() and weight.numel():
        backend = backends.select(weight.device)
        if weight.dtype not in FLOATS:
            # No kernel of ours has the norm of complex numbers; torch decides on the rest.
            backend = backends.load("torch")
        backend.embedding_renorm_(weight, indices, max_norm, norm_type)


for _name, _kernel in (
    ("embedding", _embedding),
    ("embedding_dense_backward", _embedding_dense_backward),
    ("embedding_dense_double_backward", _embedding_dense_double_backward),
    ("embedding_renorm_", _embedding_renorm_),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


# Shapes without data.


@torch.library.register_fake("gpu_embed::embedding", lib=_library)
def _embedding_fake(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    bounds.prepare(weight.device)
    return weight.new_empty((*indices.shape, weight.shape[1]))


@torch.library.register_fake("gpu_embed::embedding_dense_backward", lib=_library)
def _embedding_dense_backward_fake(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    return grad_output.new_empty((num_embeddings, grad_output.shape[-1]))


@torch.library.register_fake("gpu_embed::embedding_dense_double_backward", lib=_library)
def _embedding_dense_double_backward_fake(
    grad: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    return grad.new_empty((*indices.shape, grad.shape[1]))


@torch.library.register_fake("gpu_embed::embedding_renorm_", lib=_library)
def _embedding_renorm_fake(
    weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
) -> None:
    return None


# Gradients.


def _embedding_adjoint(
    grad: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    if sparse:
        return sparse_gradient(grad, indices, num_embeddings, padding_idx, scale_grad_by_freq)
    return call_embedding_dense_backward(
        grad, indices, num_embeddings, padding_idx, scale_grad_by_freq
    )


def _embedding_dense_backward_adjoint(
    grad: Tensor,
    indices: Tensor,
    _: int,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    return call_embedding_dense_double_backward(grad, indices, padding_idx, scale_grad_by_freq)


def sparse_gradient(
    grad_output: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """torch's sparse gradient: COO, int64 ids in input order, duplicates kept, padding dropped.

    Differentiable, since it is made of torch's own operators. Ids out of range are dropped, too; on CUDA, where
    dropping would wait for the GPU, both become zeros, and in a graph ids out of range do.
    """
    if scale_grad_by_freq:
        raise RuntimeError(
            "embedding_backward: scale_grad_by_freq not supported with sparse gradients"
        )
    bounds.raise_pending(grad_output.device)
    ids = indices.reshape(-1).to(torch.int64)
    values = grad_output.reshape(ids.numel(), grad_output.shape[-1])
    kept = bounds.in_table(ids, num_embeddings)
    if padding_idx >= 0:
        kept = kept & (ids != padding_idx)
    if num_embeddings == 0 or ids.numel() == 0:
        ids, values = ids[:0], values[:0]
    elif ids.device.type == "cpu" and (padding_idx >= 0 or type(kept) is Tensor):
        # Of a fake tensor nobody knows how many are kept.
        ids, values = ids[kept], values[kept]
    else:
        ids, values = _zeroed(ids, values, kept)
    size = (num_embeddings, grad_output.shape[-1])
    return torch.sparse_coo_tensor(
        ids[None], values, size, device=values.device, check_invariants=False
    )


def _zeroed(ids: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that are not kept become zeros for a row that a kept one names; the host sees no data.

    So no other row has an entry, which an optimizer would take for a gradient. If none is kept, row 0 has.
    """
    named = torch.where(kept, ids, 0).amax()
    return torch.where(kept, ids, named), torch.where(kept[:, None], values, 0)


def _dispatch_keys(*keys: torch._C.DispatchKey) -> int:
    """The raw representation of a set of keys."""
    key_set = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        key_set = key_set.add(key)
    return key_set.raw_repr()


_Key = torch._C.DispatchKey
# What a tensor with data of its own carries: no wrapper, no lazy conjugate, no fake.
PLAIN_TENSORS = frozenset(
    (
        _dispatch_keys(_Key.CPU, _Key.ADInplaceOrView, _Key.AutogradCPU, _Key.AutocastCPU),
        _dispatch_keys(_Key.CUDA, _Key.ADInplaceOrView, _Key.AutogradCUDA, _Key.AutocastCUDA),
    )
)
# What eager mode turns on, without and with inference mode: no tracer, no functorch, no dispatch mode.
PLAIN_MODES = frozenset(
    (_dispatch_keys(_Key.BackendSelect, _Key.ADInplaceOrView), _dispatch_keys(_Key.BackendSelect))
)


def is_plain_call(x: Tensor, indices: Tensor) -> bool:
    """Whether the dispatcher would go straight to autograd and from there to the kernel."""
    return (
        not torch.compiler.is_compiling()
        and is_plain_mode()
        and (torch._C._dispatch_keys(x) | torch._C._dispatch_keys(indices)).raw_repr()
        in PLAIN_TENSORS
    )


def is_plain_mode() -> bool:
    """Whether nothing but autograd stands between a call and its kernel, for plain tensors."""
    return (
        _included_keys().raw_repr() in PLAIN_MODES
        and forward_ad._current_level < 0
        and not _profiler_enabled()
    )


_included_keys = torch._C._dispatch_tls_local_include_set
_profiler_enabled = torch.autograd._profiler_enabled


def _register_linear(
    op: torch._ops.OpOverload, kernel: Callable[..., Tensor], adjoint: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register the gradients of an operator that is linear in its first argument.

    Args:
        op: op(x, indices, *arguments).
        kernel: the same, on data.
        adjoint: adjoint(grad, indices, x.shape[0], *arguments) -> gradient of x.

    Returns:
        `op` as a function that spares a plain call the dispatcher.
    """
    after_autograd = torch._C._after_autograd_keyset
    num_arguments = len(op._schema.arguments) - 2

    # functorch hands each of its levels to the Autograd key in turn, so one level is what we differentiate.
    class Linear(_SingleLevelFunction):
        # torch.autograd.Function has it; compiled autograd asks for it.
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

        @staticmethod
        def forward(
            ctx: Any, run: Callable[..., Tensor], x: Tensor, indices: Tensor, *arguments: Any
        ) -> Tensor:
            ctx.arguments = arguments
            ctx.num_rows = x.shape[0]
            # Saved, so that autograd notices ids that were changed in place.
            ctx.save_for_backward(indices)
            if forward_ad._current_level >= 0:
                ctx.save_for_forward(indices)
            return run(x, indices, *arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            (indices,) = ctx.saved_tensors
            grad_x = adjoint(grad, indices, ctx.num_rows, *ctx.arguments)
            return (None, grad_x, None, *(None,) * num_arguments)

        @staticmethod
        def jvp(ctx: Any, _: None, tangent: Tensor | None, *rest: None) -> Tensor | None:
            if tangent is None:
                return None
            (indices,) = ctx.saved_tensors
            return op(tangent, indices, *ctx.arguments)

    apply: Callable[..., Tensor] = Linear.apply  # type: ignore[attr-defined]

    def below_autograd(keyset: Any, x: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after_autograd, x, indices, *arguments)

    def below_one_level(keyset: Any, *arguments: Any) -> Tensor:
        # The levels below differentiate too, and this one has switched their modes off.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return below_autograd(keyset, *arguments)

    def autograd(keyset: Any, x: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if not differentiated and forward_ad._current_level < 0:
            return below_autograd(keyset, x, indices, *arguments)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(partial(below_one_level, keyset), x, indices, *arguments)
        return apply(partial(below_autograd, keyset), x, indices, *arguments)

    def call(x: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
        if not is_plain_call(x, indices):
            return op(x, indices, *arguments)
        if x.requires_grad and torch.is_grad_enabled():
            return apply(kernel, x, indices, *arguments)
        return kernel(x, indices, *arguments)

    name = op._schema.name.removeprefix("gpu_embed::")
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return call


call_embedding = _register_linear(embedding, _embedding, _embedding_adjoint)
call_embedding_dense_backward = _register_linear(
    embedding_dense_backward, _embedding_dense_backward, _embedding_dense_backward_adjoint
)
call_embedding_dense_double_backward = _register_linear(
    embedding_dense_double_backward,
    _embedding_dense_double_backward,
    call_embedding_dense_backward,
)


class KnownEmbedding(_SingleLevelFunction):
    """`call_embedding` in a known table: the least that autograd lets a Function cost."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, table: KnownTable) -> Tensor:
        ctx.table = table
        # Saved, so that autograd notices ids that were changed in place.
        ctx.save_for_backward(indices)
        return table.embedding(weight, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        table = ctx.table
        return _embedding_adjoint(grad, indices, table.num_embeddings, *table.arguments), None, None


_apply_known = KnownEmbedding.apply  # type: ignore[attr-defined]


def call_known_embedding(table: KnownTable, weight: Tensor, indices: Tensor) -> Tensor:
    """`call_embedding` for a table and ids that it serves."""
    # `is_plain_mode`, without the call.
    if (
        _included_keys().raw_repr() not in PLAIN_MODES
        or forward_ad._current_level >= 0
        or _profiler_enabled()
    ):
        return embedding(weight, indices, *table.arguments)
    if weight.requires_grad and torch.is_grad_enabled():
        output: Tensor = _apply_known(weight, indices, table)
        return output
    return table.embedding(weight, indices)


def _renorm_in_place(keyset: Any, weight: Tensor, *arguments: Any) -> None:
    torch.autograd.graph.increment_version(weight)
    embedding_renorm_.redispatch(
        keyset & torch._C._after_ADInplaceOrView_keyset, weight, *arguments
    )


_library.impl("embedding_renorm_", _renorm_in_place, "ADInplaceOrView", with_keyset=True)


# vmap: B tables are one table of B * V rows, in which example b's ids are shifted by b * V.


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


@torch.library.register_vmap("gpu_embed::embedding", lib=_library)
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


@torch.library.register_vmap("gpu_embed::embedding_dense_backward", lib=_library)
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


@torch.library.register_vmap("gpu_embed::embedding_dense_double_backward", lib=_library)
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


@torch.library.register_vmap("gpu_embed::embedding_renorm_", lib=_library)
def _embedding_renorm_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    indices: Tensor,
    max_norm: float,
    norm_type: float,
) -> tuple[None, None]:
    if in_dims[0] is None:
        embedding_renorm_(weight, indices, max_norm, norm_type)
        return None, None
    examples = _batched(indices, in_dims[1], info.batch_size)
    for table, ids in zip(weight.movedim(in_dims[0], 0), examples, strict=True):
        embedding_renorm_(table, ids, max_norm, norm_type)
    return None, None
