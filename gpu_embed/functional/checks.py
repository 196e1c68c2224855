"""What several functions check of their arguments, and the words of torch's errors."""

import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from ..bags import check_offsets
from ..dtypes import FLOATS
from ..ops.plain import is_plain_call

# Tensors whose data (or stand-in for data) our ops can take; other subclasses bring their own embedding.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def has_dtensor(*tensors: object) -> bool:
    """Whether these are tensors, one of them a DTensor; by the name, as that is slow to import and may not be there.

    Not within torch.func's transforms, whose own tensors hide what they wrap: there torch's function serves.
    """
    given: list[Any] = [tensor for tensor in tensors if tensor is not None]
    return (
        all(isinstance(tensor, Tensor) for tensor in given)
        and any(type(tensor).__name__ == "DTensor" for tensor in given)
        # torch.compile cannot trace the question.
        and (is_compiling() or not any(map(is_functorch_wrapped_tensor, given)))
    )


def check_not_sparse(function: str, sparse: bool) -> None:
    if sparse:
        raise NotImplementedError(
            f"{function}: sparse=True has no gradient for a DTensor; leave it out, or, for a table without bags, put "
            "gpu_embed.distributed.ShardedEmbedding.from_module(layer, mesh) in the place of the layer"
        )


def check_plain_offsets(offsets: Tensor | None, indices: Tensor) -> None:
    """`check_offsets` for what the operator would refuse, before anything is changed; nothing on CUDA and in graphs."""
    if offsets is not None and offsets.device.type == "cpu" and is_plain_call(offsets):
        check_offsets(offsets, indices)


def as_index(padding_idx: Any) -> Any:
    """padding_idx as an int; NumPy's integers and 0-d tensors are fine, as for torch."""
    if padding_idx is None or isinstance(padding_idx, torch.SymInt):
        return padding_idx
    try:
        if isinstance(padding_idx, bool):
            raise TypeError
        return operator.index(padding_idx)
    except TypeError:
        raise wrong_type("embedding", "padding_idx", 3, "int", padding_idx) from None


def as_float(value: Any, argument: str, position: int) -> float:
    """A number as a float; NumPy's and 0-d tensors are fine, as for torch."""
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, Tensor)
        and value.dim() == 0
        and not value.is_complex()
        and not value.requires_grad
    )
    if not is_number:
        raise wrong_type("embedding_renorm_", argument, position, "float", value)
    return float(value)


def check_norm(weight: Tensor) -> None:
    if weight.size(1) > 1 and weight.stride(1) == 0:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single "
            "memory location. Please clone() the tensor before performing the operation."
        )
    name = weight.type().rpartition(".")[2].removesuffix("Tensor")
    if weight.is_floating_point() and weight.dtype not in FLOATS:
        raise NotImplementedError(f"\"norm_{weight.device.type}\" not implemented for '{name}'")
    if not (weight.is_floating_point() or weight.is_complex()):
        # torch's own type, which is a kind of RuntimeError too.
        error = NotImplementedError if torch.__version__ >= "2.15" else RuntimeError
        raise error(
            f"norm(): input dtype should be either floating point or complex. Got {name} instead."
        )


def wrong_type(
    function: str, argument: str, position: int, expected: str, value: object
) -> TypeError:
    hint = tensor_hint(argument, value) if expected == "Tensor" else ""
    return TypeError(
        f"{function}(): argument '{argument}' (position {position}) must be {expected}, "
        f"not {type(value).__name__}{hint}"
    )


def tensor_hint(argument: str, value: object) -> str:
    """What makes a tensor of a list, an array or a number; empty where nothing does."""
    if not (isinstance(value, (list, tuple, range, numbers.Number)) or hasattr(value, "__array__")):
        return ""
    device = "" if argument == "weight" else ", device=weight.device"
    return f"; make it one with torch.as_tensor({argument}{device})"


def integer_hint(argument: str) -> str:
    return f"; {argument} must be int64 or int32: convert it with {argument}.long()"


def wrap_padding_idx(padding_idx: int | None, num_embeddings: int) -> int:
    """The row that gets no gradient; -1: none."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < max(num_embeddings, 1):
        raise AssertionError("Padding_idx must be within num_embeddings")
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx
