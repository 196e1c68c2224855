"""Sums over runs of equal keys that cross the edges of chunks: a walk of the chunks, then a join of their carries."""

from typing import NamedTuple

import torch
from torch import Tensor

from .access import cdiv

# Keys a chunk, at least.
MIN_CHUNK = 16
# So many keys or fewer are one chunk: the join of two chunks takes longer than a walk of both.
MAX_WHOLE = 32
# Partial sums that the join adds while the walk passes one key, to both sides of a run.
JOINED_PER_KEY = 16
# Limit on the partial sums.
MAX_PARTIAL_BYTES = 48 * 2**20


class Runs(NamedTuple):
    """What is summed, in the order of the kernels' arguments."""

    values: Tensor  # [*, D]
    order: Tensor  # [N]: the row of values of each key
    keys: Tensor  # [N], ascending


class Carries(NamedTuple):
    """How the keys are cut, and where the carry-in (2c) and carry-out (2c + 1) of each chunk c lie."""

    # [2 * num_chunks * D], and behind them the ids of each slot where they are counted. None: atomics add the carries.
    partial: Tensor | None
    chunk_size: int
    num_chunks: int

    @property
    def launches(self) -> tuple[bool, ...]:
        """Of each launch, whether it joins."""
        return (False,) if self.partial is None or self.num_chunks == 1 else (False, True)


def cut(
    keys: Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
    *,
    counted: bool = False,
    atomic: bool = False,
) -> Carries:
    """
    Args:
        dtype: of the sums.
        counted: whether the ids of each partial sum are.
        atomic: whether atomics add the carries.
    """
    chunk = chunk_size(keys.numel(), embedding_dim, dtype.itemsize)
    num_chunks = cdiv(keys.numel(), chunk)
    if atomic:
        return Carries(None, chunk, num_chunks)
    partial = keys.new_empty(2 * num_chunks * (embedding_dim + counted), dtype=dtype)
    return Carries(partial, chunk, num_chunks)


def chunk_size(num_keys: int, embedding_dim: int, acc_bytes: int) -> int:
    """Keys a chunk, by shapes and dtype alone, as it decides the order of the additions.

    A program of the walk passes its keys one after another, and one of the join as many partial sums as a run has
    chunks, so a chunk has about the root of the number of keys. It is longer where the partial sums would take too much
    memory.
    """
    chunk = MIN_CHUNK
    while chunk < num_keys and (
        num_keys <= MAX_WHOLE
        or JOINED_PER_KEY * chunk**2 < num_keys
        or 2 * cdiv(num_keys, chunk) * embedding_dim * acc_bytes > MAX_PARTIAL_BYTES
    ):
        chunk *= 2
    return chunk
