"""How wide a kernel may read: words and vectors that the tensors' addresses and strides allow."""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR_BYTES = 16


class WordLayout(NamedTuple):
    """A table seen as raw words, for a kernel that copies rows whatever their dtype."""

    word_bytes: int  # 1, 2, 4 or 8
    vec: int  # words that one access may move: 2 words of 8 bytes where all is 16-byte aligned, else 1
    row_words: int
    row_stride: int  # in words
    col_stride: int  # in words


def word_layout(weight: Tensor) -> WordLayout:
    """The widest words in which rows of weight [V, D] can be copied.

    Raises ValueError for complex128 with column stride != 1: words have at most 8 bytes.
    """
    itemsize = weight.element_size()
    num_columns = weight.shape[1]
    row_stride, col_stride = weight.stride()
    if num_columns > 1 and col_stride != 1:
        if itemsize > 8:
            raise ValueError("items of 16 bytes need adjacent columns")
        return WordLayout(itemsize, 1, num_columns, row_stride, col_stride)
    alignment = gcd(VECTOR_BYTES, num_columns * itemsize, row_stride * itemsize, weight.data_ptr())
    word_bytes = min(alignment, 8)
    return WordLayout(
        word_bytes,
        alignment // word_bytes,
        num_columns * itemsize // word_bytes,
        row_stride * itemsize // word_bytes,
        1,
    )


def vector_width(matrix: Tensor) -> int:
    """Items of matrix [N, D] that one access may move: a power of two that divides D and the row stride."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        return 1
    itemsize = matrix.element_size()
    alignment = gcd(
        VECTOR_BYTES,
        matrix.shape[1] * itemsize,
        matrix.stride(0) * itemsize,
        matrix.data_ptr(),
    )
    return alignment // itemsize


class RowSteps(NamedTuple):
    """One dimension before the last, in rows of `row_matrix`."""

    size: int
    step: int  # in rows


def row_matrix(grad_output: Tensor) -> tuple[Tensor, list[RowSteps]]:
    """grad_output [..., D], not empty, viewed as [R, D], without a copy.

    One stride: position n is row n. Several: `row_numbers` maps a position to its row. A transposed [B, L, D] has
    two strides, and so has a mean's gradient that was expanded from [B, 1, D].
    """
    outer: list[tuple[int, int]] = []
    for size, stride in zip(grad_output.shape[:-1], grad_output.stride()[:-1], strict=True):
        if outer and outer[-1][1] == stride * size:
            outer[-1] = outer[-1][0] * size, stride
        elif size > 1:
            outer.append((size, stride))
    embedding_dim = grad_output.shape[-1]
    if len(outer) <= 1:
        return grad_output.view(-1, embedding_dim), []
    unit = gcd(*(stride for _, stride in outer))
    steps = [RowSteps(size, stride // unit) for size, stride in outer]
    strides = unit, grad_output.stride(-1)
    return grad_output.as_strided((_num_rows(steps), embedding_dim), strides), steps


def row_numbers(steps: list[RowSteps], device: torch.device) -> Tensor | None:
    """The row of each position, int32 or int64 [N], for what `row_matrix` returned; None: its own."""
    if not steps:
        return None
    dtype = torch.int32 if _num_rows(steps) < 2**31 else torch.int64
    rows = torch.zeros((), dtype=dtype, device=device)
    for size, step in steps:
        rows = rows[..., None] + step * torch.arange(size, dtype=dtype, device=device)
    return rows.view(-1)


def _num_rows(steps: list[RowSteps]) -> int:
    return 1 + sum((size - 1) * step for size, step in steps)


def table_vector_width(values: Tensor, dim_divisor: int) -> int:
    """Items that one access may move in every row of every table: a power of two that divides each D.

    dim_divisor: the largest number that divides each D.
    values: the tables' buffer, or a matrix in whose rows the tables' columns lie, as in the output's gradient.
    """
    itemsize = values.element_size()
    if values.dim() == 2 and values.shape[1] > 1 and values.stride(1) != 1:
        return 1
    row_stride = values.stride(0) if values.dim() == 2 else 0
    alignment = gcd(
        VECTOR_BYTES,
        dim_divisor * itemsize,
        row_stride * itemsize,
        values.data_ptr(),
    )
    return alignment // itemsize


def flat_ids(indices: Tensor) -> Tensor:
    """The ids [N], adjacent in memory, in their own dtype; a copy only where they are not adjacent."""
    return indices.contiguous().view(-1)


def sort_key_dtype(num_embeddings: int) -> torch.dtype:
    """The narrowest dtype that holds every row number and `num_embeddings` itself, as keys.

    torch.sort is a radix sort on CUDA, one pass a byte: narrow keys are fast keys. It takes no uint16 there, so an
    int16 key is the row number less 32,768.
    """
    for dtype, most in ((torch.uint8, 2**8), (torch.int16, 2**16), (torch.int32, 2**31)):
        if num_embeddings < most:
            return dtype
    return torch.int64


def rows_of_keys(keys: Tensor) -> Tensor:
    """The row number of each key, int64."""
    rows = keys.to(torch.int64)
    return rows.add_(2**15) if keys.dtype == torch.int16 else rows


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
