"""Batched lookups in many tables; every user error of theirs is raised here."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..dtypes import FLOATS, IDS
from ..exporting import is_exporting
from ..ops.tables import call_table_batched_embedding
from ..tables.inputs import BatchSizes, TableInput, pad_offsets
from ..tables.layout import TableLayout, Tables, as_int, quoted
from . import exported
from .checks import check_plain_offsets, tensor_hint


def table_batched_embedding(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tables: Tables,
    sparse: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of the ids of all tables, `[N, embedding_dim]`; see `gpu_embed.TableBatchedEmbedding`."""
    if not tables.layout.is_uniform:
        raise ValueError(
            "rows of tables of different embedding_dims have no common shape: "
            f"{_dims(tables)}; look them up with gpu_embed.TableBatchedEmbeddingBag, or table by table"
        )
    return _look_up(input, weight, offsets, tables, None, sparse, output_dtype, pooled=False)


def table_batched_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tables: Tables,
    per_sample_weights: Tensor | None = None,
    sparse: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sums, means and maxima of the bags of all tables, [B, sum of embedding_dims]; see `TableBatchedEmbeddingBag`."""
    check_sample_weights(input, per_sample_weights, weight, tables.layout)
    return _look_up(
        input, weight, offsets, tables, per_sample_weights, sparse, output_dtype, pooled=True
    )


def _look_up(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tables: Tables,
    per_sample_weights: Tensor | None,
    sparse: bool,
    output_dtype: torch.dtype | None,
    *,
    pooled: bool,
) -> Tensor:
    layout = tables.layout
    function = "table_batched_embedding_bag" if pooled else "table_batched_embedding"
    check_batch(function, input, offsets, weight, layout)
    if per_sample_weights is not None and per_sample_weights.device != weight.device:
        raise _other_device(function, "per_sample_weights", per_sample_weights, weight)
    if weight.dtype not in FLOATS:
        raise RuntimeError(
            f"{function}: expected tables of float64, float32, float16 or bfloat16, got {weight.dtype}"
        )
    if output_dtype is not None and (output_dtype == torch.float64) != (
        weight.dtype == torch.float64
    ):
        raise RuntimeError(
            f"{function}: output_dtype is {output_dtype}, but the tables are {weight.dtype}: of float64 tables the "
            "output is float64, and of no others"
        )
    if is_compiling() and is_exporting():
        return exported.table_batched_embedding(
            weight, per_sample_weights, input, offsets, tables, pooled, sparse, output_dtype
        )
    call = call_table_batched_embedding
    if sparse and not layout.is_uniform and torch.compiler.is_compiling():
        call = _call_in_eager_mode
    return call(weight, per_sample_weights, input, offsets, tables, pooled, sparse, output_dtype)


def sizes_in_order(function: str, batch_sizes: BatchSizes, features: tuple[str, ...]) -> list[int]:
    """How many bags each of these features has, given by name or in their order."""
    if isinstance(batch_sizes, Mapping):
        if batch_sizes.keys() != set(features):
            raise ValueError(
                f"{function}: batch_sizes are given for {quoted(map(str, batch_sizes))}, but the features are "
                f"{quoted(features)}"
            )
        values = [batch_sizes[feature] for feature in features]
    elif isinstance(batch_sizes, Sequence) and not isinstance(batch_sizes, str):
        values = list(batch_sizes)
    else:
        raise TypeError(
            f"{function}: batch_sizes must be ints, one a feature: a mapping by the features' names, or a sequence, "
            f"got {type(batch_sizes).__name__}{'; call its tolist()' if hasattr(batch_sizes, 'tolist') else ''}"
        )
    if len(values) != len(features):
        raise ValueError(
            f"{function}: batch_sizes has {len(values)} numbers, but there are {len(features)} features: "
            f"{quoted(features)}"
        )
    # A graph is not to be compiled anew for each size.
    if not torch.compiler.is_compiling():
        for feature, value in zip(features, values, strict=True):
            if as_int(f"{function}: batch_sizes: feature {feature!r}", value) < 0:
                raise ValueError(f"{function}: batch_sizes: feature {feature!r} has {value} bags")
    return values


def pad_batch(
    function: str,
    input: Tensor,
    offsets: Tensor,
    batch_sizes: BatchSizes,
    features: tuple[str, ...],
) -> Tensor:
    """Offsets of features with a batch size each, as those of features that all have the largest.

    Args:
        features: in the order of their ids.
    """
    sizes = sizes_in_order(function, batch_sizes, features)
    for name, value in (("input", input), ("offsets", offsets)):
        _check_is_tensor(function, name, value)
    if offsets.shape != (sum(sizes) + 1,):
        raise ValueError(
            f"{function}: offsets has to be of shape [{sum(sizes) + 1}], a number for each bag of batch_sizes and the "
            f"end of the last, got {list(offsets.shape)}"
        )
    if offsets.dtype in IDS:
        # Before there are more of them, as the message names places.
        check_plain_offsets(offsets, input)
    return pad_offsets(offsets, sizes)


def check_sample_weights(
    input: Tensor, per_sample_weights: Tensor | None, weight: Tensor, layout: TableLayout
) -> None:
    """Raise for weights that do not go with these ids and tables."""
    if per_sample_weights is not None:
        for name, value in (("input", input), ("per_sample_weights", per_sample_weights)):
            _check_is_tensor("table_batched_embedding_bag", name, value)
        if input.size() != per_sample_weights.size():
            raise ValueError(
                f"table_batched_embedding_bag: If per_sample_weights ({per_sample_weights.shape}) is not "
                f"None, then it must have the same shape as the input ({input.shape})"
            )
        for name, mode in zip(layout.names, layout.modes, strict=True):
            if mode != "sum":
                raise NotImplementedError(
                    "table_batched_embedding_bag: per_sample_weights is only supported for mode='sum', "
                    f"but table {name!r} has mode={mode!r}"
                )
        if per_sample_weights.dtype != weight.dtype:
            raise RuntimeError(
                "table_batched_embedding_bag: expected per_sample_weights of the tables' dtype "
                f"{weight.dtype}, got {per_sample_weights.dtype}"
            )


def check_batch(
    function: str, input: Tensor, offsets: Tensor, weight: Tensor, layout: TableLayout
) -> None:
    """Raise for ids and offsets that are no batch of these tables' features."""
    for name, value in (("input", input), ("offsets", offsets)):
        _check_is_tensor(function, name, value)
        if value.dim() != 1:
            raise ValueError(f"{function}: {name} has to be a 1D Tensor, got {value.dim()}D")
        if value.dtype not in IDS:
            raise RuntimeError(
                f"{function}: expected {name} of dtype int64, int32, int16 or uint8, got {value.dtype}: "
                f"convert it with {name}.long()"
            )
        if value.device != weight.device:
            raise _other_device(function, name, value, weight)
    if offsets.shape[0] % layout.num_features != 1 % layout.num_features or offsets.shape[0] == 0:
        raise ValueError(
            f"{function}: offsets must hold num_features * B + 1 numbers for some B, but it has "
            f"{offsets.shape[0]} and there are {layout.num_features} features: {quoted(layout.features)}; where each "
            "has a B of its own, give them as batch_sizes"
        )


def _check_is_tensor(function: str, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        return
    hint = tensor_hint(name, value)
    is_missing = name == "offsets" and value is None
    if is_missing or isinstance(value, Mapping | TableInput):
        hint = (
            "; put ids together with gpu_embed.batch_bags or batch_padded, and call layer(*batch)"
        )
    raise TypeError(
        f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}{hint}"
    )


def _other_device(function: str, name: str, tensor: Tensor, weight: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{function}: expected all tensors to be on the same device, but {name} is on "
        f"{tensor.device} and the tables are on {weight.device}"
    )


# A graph has no place for a gradient that is no plain tensor, so torch.compile breaks its graph here.
_call_in_eager_mode = torch._disable_dynamo(call_table_batched_embedding)


def _dims(tables: Tables) -> str:
    layout = tables.layout
    return ", ".join(
        f"{name!r} {dim}" for name, dim in zip(layout.names, layout.embedding_dims, strict=True)
    )
