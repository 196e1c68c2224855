"""Lookups with Keras's rules: what the Triton and the CUDA C++ backend share."""

from abc import ABC, abstractmethod
from math import gcd

import torch
from torch import Tensor

from ...bounds import BoundsRecord
from ...take import QuantizedTable
from .access import VECTOR_BYTES, vector_width


class TakePlan(ABC):
    """`take_rows` and `dequantize_rows` of a `Backend`; the launches allocate nothing."""

    def take_rows(
        self, weight: Tensor, indices: Tensor, dtype: torch.dtype, record: BoundsRecord | None
    ) -> Tensor:
        output = weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)
        self._take_rows(weight, kernel_ids(indices), output, record)
        return output

    def dequantize_rows(
        self,
        table: QuantizedTable,
        indices: Tensor,
        dtype: torch.dtype,
        record: BoundsRecord | None,
    ) -> Tensor:
        output = table.scale.new_empty((*indices.shape, table.embedding_dim), dtype=dtype)
        if table.fused:
            table = table.with_scales()
        self._dequantize_rows(table, kernel_ids(indices), output, record)
        return output

    @abstractmethod
    def _take_rows(
        self, weight: Tensor, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None: ...

    @abstractmethod
    def _dequantize_rows(
        self, table: QuantizedTable, ids: Tensor, output: Tensor, record: BoundsRecord | None
    ) -> None: ...


def kernel_ids(indices: Tensor) -> Tensor:
    """Ids adjacent in memory; bools as the bytes that they are."""
    ids = indices.contiguous()
    return ids.view(torch.uint8) if ids.dtype == torch.bool else ids


def taken_vector(weight: Tensor, itemsize: int) -> int:
    """Items of a row that one access may load, and one of as many items of that size store."""
    return min(vector_width(weight), VECTOR_BYTES // itemsize)


def quantized_vector(table: QuantizedTable, itemsize: int) -> int:
    """Columns of one scale that a thread may hold, so that it stores no more than 16 bytes at once.

    Where two share a byte, one column or whole bytes.
    """
    widest = gcd(VECTOR_BYTES // itemsize, table.embedding_dim, table.group_size)
    per_byte = 8 // table.bits
    if table.fused:
        widest = gcd(widest, table.layout.group_bytes * per_byte)
    return max(gcd(widest, table.values.data_ptr() * per_byte), 1)
