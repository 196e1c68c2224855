"""`torch.nn.functional.embedding`'s signature on our kernels, and its errors."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..dtypes import IDS
from ..exporting import is_exporting
from ..ops.known import KnownTable, call_known_embedding, known_tables
from ..ops.lookup import call_embedding, embedding_renorm_
from ..ops.plain import is_plain_call
from . import exported
from .checks import (
    PLAIN_TYPES,
    as_float,
    as_index,
    check_norm,
    check_not_sparse,
    has_dtensor,
    integer_hint,
    wrap_padding_idx,
    wrong_type,
)
from .replicas import check_renorm_lasts


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of `weight` at the ids in `input`: `torch.nn.functional.embedding` on our kernels.

    Args:
        input: ids, any shape; int64, int32, int16 or uint8; on the table's device.
        weight: the table, `[num_embeddings, embedding_dim]`, any dtype, any strides.
        padding_idx: its row is returned as stored and gets no gradient; negative counts from the end.
        max_norm: rows looked up whose norm exceeds it are first scaled down to it, in place.
        norm_type: the p of that norm; any number, infinities and 0 too.
        scale_grad_by_freq: divide each row's gradient by how often its id occurs in `input`.
        sparse: the gradient is a sparse COO tensor (uncoalesced, ids in input order).

    Returns:
        `[*input.shape, embedding_dim]`, contiguous, the table's dtype, bit-equal to `weight[input]`.

    Raises:
        IndexError: an id is out of range; when, is set by `gpu_embed.set_bounds_check`.
        AssertionError: padding_idx is outside the table.
        RuntimeError: ids are not integers, weight is not 2-D, or the two are on different devices.
        TypeError: an argument is no tensor.

    DTensors are looked up on each rank in its own rows or columns, and the output is a DTensor: see
    `functional.dtensor`. A weight or input of another tensor subclass (torchao), and tensors that are sparse, quantized
    or nested, go to torch's own function. `torch.export` and `torch.onnx.export` record torch's operators.
    """
    known = None if is_compiling() else known_tables.get(id(weight))
    if (
        known is not None
        and max_norm is None
        and known.serves(input, weight, padding_idx, scale_grad_by_freq, sparse)
    ):
        return call_known_embedding(known, weight, input)
    sharded = False
    if (
        type(weight) not in PLAIN_TYPES
        or type(input) not in PLAIN_TYPES
        or weight.layout is not torch.strided
        or weight.is_quantized
        or weight.is_nested
        or input.is_nested
    ):
        sharded = has_dtensor(weight, input)
        if not sharded:
            return _embedding_by_torch(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
    check_tensors(input, weight)
    _check_flags(scale_grad_by_freq, sparse)
    row = wrap_padding_idx(as_index(padding_idx), weight.size(0))
    if max_norm is not None:
        max_norm = as_float(max_norm, "max_norm", 3)
        norm_type = as_float(norm_type, "norm_type", 4)
        check_norm(weight)
        if not is_compiling():
            check_renorm_lasts(weight)
    if sharded:
        from . import dtensor

        check_not_sparse("embedding", sparse)
        return dtensor.embedding(input, weight, row, max_norm, norm_type, scale_grad_by_freq)
    if is_compiling() and is_exporting():
        return exported.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if max_norm is not None:
        # Detached, so there is nothing for autograd to see.
        embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    output = call_embedding(weight, input, row, scale_grad_by_freq, sparse)
    if (
        (known is None or not known.describes(weight))
        and type(weight) is torch.nn.Parameter
        and is_plain_call(weight, input)
        and weight.numel()
    ):
        known_tables[id(weight)] = KnownTable(
            weight, padding_idx, scale_grad_by_freq, sparse, (row, scale_grad_by_freq, sparse)
        )
    return output


def _embedding_by_torch(input: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    for name, position, value in (("weight", 1, weight), ("indices", 2, input)):
        if isinstance(value, Tensor):
            continue
        if torch.overrides.has_torch_function_unary(value):
            # torch.fx's proxies and their like record the call.
            return torch.overrides.handle_torch_function(
                embedding, (input, weight), input, weight, *arguments
            )
        raise wrong_type("embedding", name, position, "Tensor", value)
    return torch.nn.functional.embedding(input, weight, *arguments)  # type: ignore[arg-type]


def check_tensors(input: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise RuntimeError("'weight' must be 2-D")
    if input.dtype not in IDS:
        raise RuntimeError(
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: "
            f"Long, Int; but got {input.type()} instead (while checking arguments for embedding)"
            f"{integer_hint('input')}"
        )
    if input.device != weight.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but got index is on "
            f"{input.device}, different from other tensors on {weight.device} "
            "(when checking argument in method gpu_embed.functional.embedding)"
        )


def _check_flags(scale_grad_by_freq: object, sparse: object) -> None:
    if not isinstance(scale_grad_by_freq, bool):
        raise wrong_type("embedding", "scale_grad_by_freq", 4, "bool", scale_grad_by_freq)
    if not isinstance(sparse, bool):
        raise wrong_type("embedding", "sparse", 5, "bool", sparse)
