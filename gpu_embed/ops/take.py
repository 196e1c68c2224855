"""The gpu_embed::take_rows* and gpu_embed::dequantize_rows operators: lookups with Keras's rules.

Ids are of any real dtype and cut to integers, negative ones count from the end, and rows are rounded to the dtype
that is asked for. Two operators are linear in their first argument and adjoint to one another:

    take_rows           weight [V, D]        -> output [..., D]
    take_rows_backward  grad_output [..., D] -> grad_weight [V, D]

Ids out of range are recorded as in every lookup; see `bounds`.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, bounds
from ..dtypes import FLOATS, KERAS_IDS
from ..take import QuantizedTable, wrap_negative
from .library import define, library
from .lookup import embedding_dense_backward


@cache
def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether rows of one dtype can be taken as the other: the same, or fp32 and 16 bit."""
    pair = {source, target}
    mixes = torch.float32 in pair and torch.float64 not in pair
    return pair <= set(FLOATS) and (source == target or mixes)


def _wrong_dtypes(
    name: str, indices: Tensor, source: torch.dtype, target: torch.dtype
) -> TypeError:
    if indices.dtype not in KERAS_IDS:
        return TypeError(
            f"{name}: ids are integers, or floats that are cut to them; got {indices.dtype}"
        )
    return TypeError(
        f"{name}: rows of {source} cannot be taken as {target}; it takes float64 as float64, and "
        "float32, float16 and bfloat16 as themselves, or from and to float32"
    )


# Dispatcher kernels (CompositeExplicitAutograd).


def _take_rows(weight: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    if indices.dtype not in KERAS_IDS or not converts(weight.dtype, dtype):
        raise _wrong_dtypes("take_rows", indices, weight.dtype, dtype)
    if indices.numel() == 0 or weight.shape[1] == 0:
        bounds.raise_pending(weight.device)
        return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)
    take_rows = backends.select(weight.device).take_rows
    return bounds.looked_up(weight.device, indices, partial(take_rows, weight, indices, dtype))


def _take_rows_backward(
    grad_output: Tensor, indices: Tensor, num_embeddings: int, dtype: torch.dtype
) -> Tensor:
    if indices.dtype not in KERAS_IDS or not converts(grad_output.dtype, dtype):
        raise _wrong_dtypes("take_rows_backward", indices, grad_output.dtype, dtype)
    rows = wrap_negative(indices, num_embeddings)
    # Summed in the table's dtype, and so rounded once.
    grad_weight: Tensor = embedding_dense_backward(
        grad_output.to(dtype), rows, num_embeddings, -1, False
    )
    return grad_weight


def _dequantize_rows(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    indices: Tensor,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    if indices.dtype not in KERAS_IDS or not converts(scale.dtype, dtype):
        raise _wrong_dtypes("dequantize_rows", indices, scale.dtype, dtype)
    if indices.numel() == 0:
        bounds.raise_pending(values.device)
        return scale.new_empty((*indices.shape, embedding_dim), dtype=dtype)
    table = QuantizedTable(values, scale, zero, embedding_dim, group_size, bits).adjacent()
    dequantize_rows = backends.select(values.device).dequantize_rows
    return bounds.looked_up(values.device, indices, partial(dequantize_rows, table, indices, dtype))


# Fake kernels.


def _take_rows_fake(weight: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    bounds.prepare(weight.device)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


def _take_rows_backward_fake(
    grad_output: Tensor, indices: Tensor, num_embeddings: int, dtype: torch.dtype
) -> Tensor:
    return grad_output.new_empty((num_embeddings, grad_output.shape[-1]), dtype=dtype)


def _dequantize_rows_fake(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    indices: Tensor,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    bounds.prepare(scale.device)
    return scale.new_empty((*indices.shape, embedding_dim), dtype=dtype)


take_rows = define(
    "take_rows(Tensor weight, Tensor indices, ScalarType dtype) -> Tensor",
    _take_rows,
    _take_rows_fake,
)
take_rows_backward = define(
    "take_rows_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, "
    "ScalarType dtype) -> Tensor",
    _take_rows_backward,
    _take_rows_backward_fake,
)
dequantize_rows = define(
    "dequantize_rows(Tensor values, Tensor scale, Tensor? zero, Tensor indices, SymInt embedding_dim, "
    "SymInt group_size, SymInt bits, ScalarType dtype) -> Tensor",
    _dequantize_rows,
    _dequantize_rows_fake,
)


# Gradients.


def _save_taken(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, indices, _ = inputs
    # Saved, so that autograd notices ids that were changed in place.
    ctx.save_for_backward(indices)
    ctx.num_embeddings, ctx.dtype = weight.shape[0], weight.dtype


def _take_rows_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return take_rows_backward(grad, indices, ctx.num_embeddings, ctx.dtype), None, None


def _save_taken_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, indices, _, _ = inputs
    ctx.save_for_backward(indices)
    ctx.dtype = grad_output.dtype


def _take_rows_backward_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return take_rows(grad, indices, ctx.dtype), None, None, None


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "dequantize_rows: the scales of a quantized table have no gradient; detach them"
    )


torch.library.register_autograd(
    "gpu_embed::take_rows", _take_rows_adjoint, setup_context=_save_taken, lib=library
)
torch.library.register_autograd(
    "gpu_embed::take_rows_backward",
    _take_rows_backward_adjoint,
    setup_context=_save_taken_backward,
    lib=library,
)
torch.library.register_autograd("gpu_embed::dequantize_rows", _no_gradient, lib=library)
