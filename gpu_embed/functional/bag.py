"""`torch.nn.functional.embedding_bag`'s signature on our kernels, and its errors."""

import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..dtypes import FLOATS, IDS
from ..exporting import is_exporting
from ..ops.bag import call_embedding_bag, call_embedding_bag_max
from ..ops.lookup import embedding_renorm_
from . import exported
from .checks import (
    PLAIN_TYPES,
    as_float,
    check_norm,
    check_not_sparse,
    check_plain_offsets,
    has_dtensor,
    integer_hint,
    tensor_hint,
    wrong_type,
)
from .replicas import check_renorm_lasts


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, mean or maximum of the rows of each bag: `torch.nn.functional.embedding_bag` on our kernels.

    Args:
        input: ids; `[B, L]`, B bags of L ids, or `[N]`, cut into bags by `offsets`; int64, int32, int16 or uint8.
        weight: the table, `[num_embeddings, embedding_dim]`; fp64, fp32, fp16 or bf16; any strides.
        offsets: where each bag begins, `[B]`, of any dtype that ids may have; needed where `input` is 1-D.
        max_norm: rows looked up whose norm exceeds it are first scaled down to it, in place.
        norm_type: the p of that norm; any number, infinities and 0 too.
        scale_grad_by_freq: divide each row's gradient by how often its id occurs in `input`; not for "max".
        mode: "sum", "mean" or "max".
        sparse: the gradient is a sparse COO tensor (uncoalesced, ids in input order); not for "max".
        per_sample_weights: multiplies each row; `input`'s shape, the table's dtype; for "sum" only.
        include_last_offset: `offsets` is `[B + 1]`, its last number where the last bag ends; ids behind it
            are in no bag.
        padding_idx: ids equal to it take no part, in the mean's divisor neither; negative counts from the end.

    Returns:
        `[B, embedding_dim]`, contiguous, the table's dtype; an empty bag's row is zero. Sums are taken in
        fp32 (fp64 for fp64) and rounded once. The first of equal maxima gets the gradient.

    Raises:
        IndexError, RuntimeError: an id is out of range (one error of both types: ours and torch's);
            `gpu_embed.set_bounds_check` sets when.
        RuntimeError: padding_idx is outside the table; ids, offsets, weight or per_sample_weights are of the
            wrong dtype, or on different devices; offsets on the CPU do not cut the ids into bags.
        ValueError: shapes that do not fit, an unknown mode, an argument that mode "max" does not have.
        NotImplementedError: per_sample_weights in a mode other than "sum".
        TypeError: an argument of the wrong type.
        AttributeError: a list, an array or a number in place of a tensor, as for torch.

    Which tensors go to torch's own function, and what exporters record, is as for `embedding`.
    """
    sharded = False
    if (
        type(weight) not in PLAIN_TYPES
        or type(input) not in PLAIN_TYPES
        or not (offsets is None or type(offsets) in PLAIN_TYPES)
        or not (per_sample_weights is None or type(per_sample_weights) in PLAIN_TYPES)
        or weight.layout is not torch.strided
        or weight.is_quantized
        or weight.is_nested
        or input.is_nested
    ):
        sharded = has_dtensor(input, weight, offsets, per_sample_weights)
        if not sharded:
            return _embedding_bag_by_torch(
                input,
                weight,
                offsets,
                max_norm,
                norm_type,
                scale_grad_by_freq,
                mode,
                sparse,
                per_sample_weights,
                include_last_offset,
                padding_idx,
            )
    if weight.dtype == torch.long and input.is_floating_point():
        warnings.warn(
            "Argument order of nn.functional.embedding_bag was changed. "
            "Usage `embedding_bag(weight, input, ...)` is deprecated, "
            "and should now be `embedding_bag(input, weight, ...)`.",
            stacklevel=2,
        )
        weight, input = input, weight
    _check_bag_shapes(input, weight, offsets, per_sample_weights)
    if mode not in ("sum", "mean"):
        _check_mode(mode, scale_grad_by_freq, sparse)
    if max_norm is not None:
        max_norm = as_float(max_norm, "max_norm", 3)
        norm_type = as_float(norm_type, "norm_type", 4)
        check_norm(weight)
        if not is_compiling():
            check_renorm_lasts(weight)
    if per_sample_weights is not None and mode != "sum":
        raise NotImplementedError(
            "embedding_bag: per_sample_weights was not None. "
            "per_sample_weights is only supported for mode='sum' "
            f"(got mode='{mode}'). Please open a feature request on GitHub."
        )
    if offsets is None:
        include_last_offset = False
    if not (type(scale_grad_by_freq) is type(sparse) is type(include_last_offset) is bool):
        raise _wrong_flag(scale_grad_by_freq, sparse, include_last_offset)
    padding_idx = -1 if padding_idx is None else _wrap_bag_padding_idx(padding_idx, weight.size(0))
    if input.dtype not in IDS or not (offsets is None or offsets.dtype in IDS):
        input, offsets = _bag_index_dtypes(input, offsets)
    _check_bag_tensors(input, weight, offsets, per_sample_weights)
    if include_last_offset and offsets is not None and offsets.size(0) == 0:
        raise RuntimeError("include_last_offset: number of offset should be at least 1")
    if sharded:
        from . import dtensor

        check_not_sparse("embedding_bag", sparse)
        return dtensor.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if is_compiling() and is_exporting():
        return exported.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if max_norm is not None:
        # Last, so that a call that was refused has not changed the table.
        check_plain_offsets(offsets, input)
        embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    if mode == "max":
        return call_embedding_bag_max(weight, input, offsets, include_last_offset, padding_idx)
    return call_embedding_bag(
        weight,
        per_sample_weights,
        input,
        offsets,
        include_last_offset,
        padding_idx,
        mode,
        scale_grad_by_freq,
        sparse,
    )


def _embedding_bag_by_torch(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    arguments = (
        offsets,
        max_norm,
        norm_type,
        scale_grad_by_freq,
        mode,
        sparse,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )
    tensors = (input, weight, offsets, per_sample_weights)
    for value in tensors:
        if not isinstance(value, Tensor) and torch.overrides.has_torch_function_unary(value):
            # torch.fx's proxies and their like record the call.
            return torch.overrides.handle_torch_function(
                embedding_bag, tensors, input, weight, *arguments
            )
    try:
        return torch.nn.functional.embedding_bag(input, weight, *arguments)
    except (AttributeError, TypeError) as error:
        # torch says what the argument lacks, and not which one it is.
        names = ("input", "weight", "offsets", "per_sample_weights")
        for name, value in zip(names, tensors, strict=True):
            if not isinstance(value, Tensor) and (value is not None or name in names[:2]):
                raise type(error)(
                    f"{error}; argument '{name}' must be Tensor, not {type(value).__name__}"
                    f"{tensor_hint(name, value)}"
                ) from None
        raise


def _check_bag_shapes(
    input: Tensor, weight: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> None:
    if per_sample_weights is not None and input.size() != per_sample_weights.size():
        raise ValueError(
            f"embedding_bag: If per_sample_weights ({per_sample_weights.shape}) is not None, "
            f"then it must have the same shape as the input ({input.shape})"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"weight has to be a 2D Tensor, but got Tensor of dimension {weight.dim()}"
        )
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError(
                "if input is 2D, then offsets has to be None, as input is treated is a mini-batch of "
                f"fixed length sequences. However, found offsets of type {type(offsets)}"
            )
        if input.size(1) == 0:
            # torch makes offsets with torch.arange, whose error this is.
            raise RuntimeError("step must be nonzero")
    elif input.dim() != 1:
        raise ValueError(
            f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}"
        )
    elif offsets is None:
        raise ValueError("offsets has to be a 1D Tensor but got None")
    elif offsets.dim() != 1:
        raise ValueError("offsets has to be a 1D Tensor")


def _check_mode(mode: str, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raise for a mode that is neither "sum" nor "mean"."""
    if mode != "max":
        raise ValueError("mode has to be one of sum, mean or max")
    if scale_grad_by_freq:
        raise ValueError("max mode does not support scaling the gradient by the frequency")
    if sparse:
        raise ValueError("max mode does not support sparse weights")


def _wrong_flag(*flags: object) -> TypeError:
    """The error for the first of these flags that is no bool."""
    named = zip(
        ("scale_grad_by_freq", "sparse", "include_last_offset"), (4, 6, 8), flags, strict=True
    )
    name, position, value = next(one for one in named if not isinstance(one[2], bool))
    return wrong_type("embedding_bag", name, position, "bool", value)


def _wrap_bag_padding_idx(padding_idx: Any, num_embeddings: int) -> int:
    """The row that takes no part."""
    if not isinstance(padding_idx, torch.SymInt):
        try:
            if isinstance(padding_idx, bool):
                raise TypeError
            padding_idx = operator.index(padding_idx)
        except TypeError:
            raise wrong_type("embedding_bag", "padding_idx", 9, "int", padding_idx) from None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise RuntimeError(
            f"padding_idx must be within the number of embeddings, -{num_embeddings} "
            f"through {num_embeddings - 1}, but got {padding_idx}"
        )
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx


def _bag_index_dtypes(input: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ids and offsets of dtypes that the kernels do not read, in the common one, as in torch."""
    is_promoted = input.dtype in (*IDS, torch.int8, torch.bool)
    hint = integer_hint("offsets" if is_promoted and offsets is not None else "input")
    common = input.dtype
    if offsets is not None:
        try:
            common = torch.promote_types(common, offsets.dtype)
        except RuntimeError as error:  # wide unsigned ones
            raise RuntimeError(f"{error}{hint}") from None
    if common not in IDS:
        raise _wrong_scalar_type("indices", input.to(common), "Long, Int", hint)
    return input.to(common), None if offsets is None else offsets.to(common)


def _check_bag_tensors(
    input: Tensor, weight: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> None:
    if weight.dtype not in FLOATS:
        raise _wrong_scalar_type("weight", weight, "Half, BFloat16, Float, Double")
    for name, tensor in (
        ("indices", input),
        ("offsets", offsets),
        ("per_sample_weights", per_sample_weights),
    ):
        if tensor is not None and tensor.device != weight.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {name} is on "
                f"{tensor.device}, different from other tensors on {weight.device} "
                "(when checking argument in method gpu_embed.functional.embedding_bag)"
            )
    if per_sample_weights is not None and per_sample_weights.dtype != weight.dtype:
        raise RuntimeError(
            "Expected tensor for argument #1 'weight' to have the same type as tensor for argument #1 "
            f"'per_sample_weights'; but type {_type_name(weight)} does not equal "
            f"{_type_name(per_sample_weights)} (while checking arguments for embedding_bag)"
        )


def _wrong_scalar_type(
    argument: str, tensor: Tensor, expected: str, hint: str = ""
) -> RuntimeError:
    return RuntimeError(
        f"Expected tensor for argument #1 '{argument}' to have one of the following scalar types: "
        f"{expected}; but got {_type_name(tensor)} instead (while checking arguments for embedding_bag)"
        f"{hint}"
    )


def _type_name(tensor: Tensor) -> str:
    """What torch's errors call the tensor's device and dtype."""
    if tensor.dtype in LEGACY_DTYPES:
        return tensor.type()
    # The name on the CPU, where it has no prefix.
    on_cpu = torch.empty(0, dtype=tensor.dtype, device="cpu")
    name = on_cpu.type().rpartition(".")[2].removesuffix("Tensor")
    return f"{tensor.device.type.upper()}{name}Type"


# Those that torch's errors call by a tensor type's name.
LEGACY_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
