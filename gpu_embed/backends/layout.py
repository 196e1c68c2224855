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

    Raises ValueError for items of 16 bytes whose columns are apart: no word holds one.
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


def flat_ids(indices: Tensor) -> Tensor:
    """The ids [N], adjacent in memory, in their own dtype; a copy only where they are not adjacent."""
    return indices.contiguous().view(-1)


def sort_key_dtype(num_embeddings: int) -> torch.dtype:
    """The narrowest dtype that holds every row number and `num_embeddings` itself.

    A radix sort makes one pass per digit, so narrow keys are fast keys.
    """
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if num_embeddings <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
