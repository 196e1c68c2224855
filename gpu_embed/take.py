"""What Keras looks up: ids of any real dtype, negative ones counted from the end, and quantized tables."""

from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import in_table
from .fused_rows import FusedRows

# What has neither kernels nor, in torch, most of its operators.
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def signed_ids(indices: Tensor) -> Tensor:
    """Ids of a `WIDE_UNSIGNED` dtype -> int64; what that does not hold becomes its greatest number."""
    ids = indices.to(torch.int64)
    if indices.dtype == torch.uint64:
        ids = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids)
    return ids


def integer_ids(indices: Tensor) -> Tensor:
    """Ids cut to int64; NaN becomes an id that no table has."""
    if indices.is_floating_point():
        indices = indices.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return indices.to(torch.int64)


def wrap_negative(indices: Tensor, num_embeddings: int) -> Tensor:
    """Negative ids wrapped -> int64; invalid ids returned unwrapped, for the error message."""
    ids = integer_ids(indices)
    rows = torch.where(ids < 0, ids + num_embeddings, ids)
    return torch.where(in_table(rows, num_embeddings), rows, ids)


class QuantizedTable(NamedTuple):
    """V rows of D columns; each group of columns of a row has a scale, and may have a zero.

    A number is value / scale, or (value - zero) * scale where there are zeros.

    Of fused rows (see `fused_rows`) `values` holds all, uint8 [V, row_bytes]. A number is code * scale + offset, and
    ids are torch's: negative ones are out of range.
    """

    values: Tensor  # int8 [V, D]; of 4 bits [V, ceil(D / 2)], the even column in the lower half of its byte
    scale: Tensor  # float [V], or [V, ceil(D / group_size)]; of fused rows the values
    zero: Tensor | None  # int8, of scale's shape
    embedding_dim: int
    group_size: int  # columns a scale; embedding_dim: one a row
    bits: int  # 8 or 4
    fused: bool = False

    @property
    def layout(self) -> FusedRows:
        """Of fused rows."""
        return FusedRows(self.embedding_dim, self.group_size, self.bits)

    def with_scales(self) -> "QuantizedTable":
        """Fused rows whose memory is seen as numbers of the scales' dtype, too."""
        return self._replace(scale=self.values.view(self.layout.scale_dtype))

    def adjacent(self) -> "QuantizedTable":
        """The same with its tensors' items adjacent in memory."""
        zero = None if self.zero is None else self.zero.contiguous()
        return self._replace(
            values=self.values.contiguous(), scale=self.scale.contiguous(), zero=zero
        )


def fused_table(weight: Tensor, layout: FusedRows) -> QuantizedTable:
    """A table of fused rows [V, row_bytes]."""
    weight = weight.contiguous()
    return QuantizedTable(weight, weight, None, *layout, fused=True)
