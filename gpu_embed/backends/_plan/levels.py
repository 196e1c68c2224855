"""Sums over runs of equal keys, cut into chunks: one launch a level."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .access import cdiv

# Keys a chunk: few, for parallelism.
CHUNK = 32
# Limit on one level's partial sums.
MAX_PARTIAL_BYTES = 48 * 2**20


class Level(NamedTuple):
    """What one launch sums, in the order of the kernels' arguments."""

    values: Tensor  # [*, D]
    order: Tensor | None  # [N]: the row of values of each key; None: its own
    keys: Tensor  # [N], ascending
    # int32 [N]: counts_ptr of segment_sum, or key_tables_ptr of tables; None: on the first level
    extra: Tensor | None


class Partial(NamedTuple):
    """Carry-in (2c) and carry-out (2c + 1) of each chunk c, in the order of the kernels' arguments."""

    values: Tensor  # [2 * num_chunks, D]
    keys: Tensor  # int64 [2 * num_chunks]
    extra: Tensor | None  # int32 [2 * num_chunks]


# For a kernel whose atomics add the carry-ins and carry-outs.
NO_PARTIAL = (None, None, None)


def levels(
    values: Tensor, order: Tensor, keys: Tensor, dim: int, dtype: torch.dtype, extra: bool
) -> Iterator[tuple[Level, Partial, int]]:
    """Yields (level, partial, chunk) per launch; each level reads the partial sums of the one before.

    Args:
        dim: columns of a partial sum.
        dtype: of the partial sums.
        extra: whether they carry a count or a table.
    """
    chunk = chunk_size(keys.numel(), dim, dtype.itemsize)
    level = Level(values, order, keys, None)
    while True:
        num_chunks = cdiv(level.keys.numel(), chunk)
        partial = Partial(
            values.new_empty((2 * num_chunks, dim), dtype=dtype),
            keys.new_empty(2 * num_chunks, dtype=torch.int64),
            keys.new_empty(2 * num_chunks, dtype=torch.int32) if extra else None,
        )
        yield level, partial, chunk
        if num_chunks <= 1:
            return
        level = Level(partial.values, None, partial.keys, partial.extra)


def chunk_size(num_keys: int, embedding_dim: int, acc_bytes: int) -> int:
    """Keys a chunk: short for parallelism, longer where the partial sums would take too much memory.

    With CHUNK 32, all later levels together need 1/15 of the first's memory.
    """
    partial_bytes = embedding_dim * acc_bytes + 8 + 4  # sum, key, count
    chunk = CHUNK
    while chunk < num_keys and 2 * cdiv(num_keys, chunk) * partial_bytes > MAX_PARTIAL_BYTES:
        chunk *= 2
    return chunk
