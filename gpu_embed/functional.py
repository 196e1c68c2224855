"""torch.nn.functional's signatures on our kernels; every user error is raised here."""

import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import ops
from .lookup import INDEX_DTYPES, KnownTable, known_tables

# Tensors whose data (or stand-in for data) our ops can take; other subclasses bring their own embedding.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


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

    A weight or input of another tensor subclass (DTensor, torchao), and tensors that are sparse, quantized
    or nested, go to torch's own function.
    """
    known = None if torch.compiler.is_compiling() else known_tables.get(id(weight))
    if (
        known is not None
        and max_norm is None
        and known.serves(input, weight, padding_idx, scale_grad_by_freq, sparse)
    ):
        return ops.call_known_embedding(known, weight, input)
    if (
        type(weight) not in PLAIN_TYPES
        or type(input) not in PLAIN_TYPES
        or weight.layout is not torch.strided
        or weight.is_quantized
        or weight.is_nested
        or input.is_nested
    ):
        return _embedding_by_torch(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    _check_tensors(input, weight)
    _check_flags(scale_grad_by_freq, sparse)
    row = _wrap_padding_idx(_as_index(padding_idx), weight.size(0))
    if max_norm is not None:
        max_norm = _as_float(max_norm, "max_norm", 3)
        norm_type = _as_float(norm_type, "norm_type", 4)
        _check_norm(weight)
        # Detached, so there is nothing for autograd to see.
        ops.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    output = ops.call_embedding(weight, input, row, scale_grad_by_freq, sparse)
    if (
        (known is None or not known.describes(weight))
        and type(weight) is torch.nn.Parameter
        and ops.is_plain_call(weight, input)
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
        raise _wrong_type("embedding", name, position, "Tensor", value)
    return torch.nn.functional.embedding(input, weight, *arguments)  # type: ignore[arg-type]


def _check_tensors(input: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise RuntimeError("'weight' must be 2-D")
    if input.dtype not in INDEX_DTYPES:
        raise RuntimeError(
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: "
            f"Long, Int; but got {input.type()} instead (while checking arguments for embedding)"
        )
    if input.device != weight.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but got index is on "
            f"{input.device}, different from other tensors on {weight.device} "
            "(when checking argument in method gpu_embed.functional.embedding)"
        )


def _as_index(padding_idx: Any) -> Any:
    """padding_idx as an int; NumPy's integers and 0-d tensors are fine, as for torch."""
    if padding_idx is None or isinstance(padding_idx, torch.SymInt):
        return padding_idx
    try:
        if isinstance(padding_idx, bool):
            raise TypeError
        return operator.index(padding_idx)
    except TypeError:
        raise _wrong_type("embedding", "padding_idx", 3, "int", padding_idx) from None


def _as_float(value: Any, argument: str, position: int) -> float:
    """A number as a float; NumPy's and 0-d tensors are fine, as for torch."""
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, Tensor)
        and value.dim() == 0
        and not value.is_complex()
        and not value.requires_grad
    )
    if not is_number:
        raise _wrong_type("embedding_renorm_", argument, position, "float", value)
    return float(value)


def _check_flags(scale_grad_by_freq: object, sparse: object) -> None:
    if not isinstance(scale_grad_by_freq, bool):
        raise _wrong_type("embedding", "scale_grad_by_freq", 4, "bool", scale_grad_by_freq)
    if not isinstance(sparse, bool):
        raise _wrong_type("embedding", "sparse", 5, "bool", sparse)


def _check_norm(weight: Tensor) -> None:
    if weight.size(1) > 1 and weight.stride(1) == 0:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single "
            "memory location. Please clone() the tensor before performing the operation."
        )
    name = weight.type().rpartition(".")[2].removesuffix("Tensor")
    if weight.is_floating_point() and weight.dtype not in ops.GRADIENT_DTYPES:
        raise NotImplementedError(f"\"norm_{weight.device.type}\" not implemented for '{name}'")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise RuntimeError(
            f"norm(): input dtype should be either floating point or complex. Got {name} instead."
        )


def _wrong_type(
    function: str, argument: str, position: int, expected: str, value: object
) -> TypeError:
    return TypeError(
        f"{function}(): argument '{argument}' (position {position}) must be {expected}, "
        f"not {type(value).__name__}"
    )


def _wrap_padding_idx(padding_idx: int | None, num_embeddings: int) -> int:
    """The row that gets no gradient; -1: none."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < max(num_embeddings, 1):
        raise AssertionError("Padding_idx must be within num_embeddings")
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx
