"""The dense gradient of a lookup: atomics, or sums of the runs of sorted ids."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...row_update import arithmetic_dtype
from .access import RowSteps, cdiv, flat_ids, row_matrix, row_numbers
from .gradient_method import choose
from .sort import SortPlan

# Keys a chunk of the sorted gradient: few, for parallelism.
CHUNK = 32
# What the partial sums of one level may take.
MAX_PARTIAL_BYTES = 48 * 2**20


class OutputBags(NamedTuple):
    """Which row of grad_output is the gradient of each position, and how it is scaled."""

    bag_of: Tensor  # [N]: the position's bag, a row of grad_output; -1: none
    per_sample_weights: Tensor | None  # [N]: multiplies that row
    sizes: Tensor | None  # int32 [B]: divides that row


# Position n has row n, as it is.
NO_BAGS = (None, None, None)


class GradientPlan(SortPlan):
    """`embedding_dense_backward` and `embedding_counts` of a `Backend`."""

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        matrix, steps = row_matrix(grad_output)
        return self._dense_backward(
            matrix, steps, indices, None, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def _dense_backward(
        self,
        grad_output: Tensor,
        steps: list[RowSteps],
        indices: Tensor,
        make_bags: Callable[[], OutputBags] | None,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        """Rows of grad_output [*, D], one a position unless there are bags, summed over each id's positions.

        `steps` lead from one position's row to the next, as `row_matrix` says.
        """
        grad_weight = grad_output.new_zeros((num_embeddings, grad_output.shape[1]))
        method = choose(
            indices.numel(),
            num_embeddings,
            grad_output.dtype,
            torch.are_deterministic_algorithms_enabled(),
            scale_grad_by_freq,
        )
        if method == "atomic":
            ids = flat_ids(indices)
            bags = make_bags() if make_bags else None
            rows = row_numbers(steps, indices.device)
            if rows is not None:
                bags = OutputBags(rows, None, None)
            self._scatter_add(grad_output, ids, bags, grad_weight, padding_idx)
            return grad_weight
        keys, order = self._sorted_keys(indices, num_embeddings, padding_idx)
        # Not made before the sort has freed its memory.
        bags = make_bags() if make_bags else None
        rows = row_numbers(steps, indices.device)
        if rows is not None:
            order = rows.index_select(0, order)
            del rows
        if method == "sorted":
            self._sum_runs(grad_output, order, keys, bags, grad_weight, scale_grad_by_freq)
        else:
            # One level: atomics add each chunk's carry-in and carry-out.
            self._segment_sum(
                grad_output, order, keys, None, bags, grad_weight, *(None,) * 3, False, CHUNK
            )
        return grad_weight

    def embedding_counts(self, indices: Tensor, num_embeddings: int) -> Tensor:
        counts = torch.zeros(num_embeddings, dtype=torch.int32, device=indices.device)
        self._counts(flat_ids(indices), counts)
        return counts

    def _sum_runs(
        self,
        grad_output: Tensor,
        order: Tensor,
        keys: Tensor,
        bags: OutputBags | None,
        grad_weight: Tensor,
        scale_grad_by_freq: bool,
    ) -> None:
        """Sum the runs of each chunk, then, level by level, the carry-ins and carry-outs of the chunks below."""
        embedding_dim = grad_weight.shape[1]
        acc_dtype = arithmetic_dtype(grad_weight.dtype)
        chunk = chunk_size(keys.numel(), embedding_dim, acc_dtype.itemsize)
        values = grad_output
        level_order: Tensor | None = order
        counts: Tensor | None = None
        while True:
            num_chunks = cdiv(keys.numel(), chunk)
            partial_values = values.new_empty((2 * num_chunks, embedding_dim), dtype=acc_dtype)
            partial_keys = order.new_empty(2 * num_chunks, dtype=torch.int64)
            partial_counts = order.new_empty(2 * num_chunks, dtype=torch.int32)
            self._segment_sum(
                values,
                level_order,
                keys,
                counts,
                bags,
                grad_weight,
                partial_values,
                partial_keys,
                partial_counts,
                scale_grad_by_freq,
                chunk,
            )
            if num_chunks <= 1:
                return
            values, keys, level_order = partial_values, partial_keys, None
            counts = partial_counts if scale_grad_by_freq else None
            bags = None

    @abstractmethod
    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        bags: OutputBags | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None: ...

    @abstractmethod
    def _segment_sum(
        self,
        values: Tensor,
        order: Tensor | None,
        keys: Tensor,
        counts: Tensor | None,
        bags: OutputBags | None,
        grad_weight: Tensor,
        partial_values: Tensor | None,
        partial_keys: Tensor | None,
        partial_counts: Tensor | None,
        scale_grad_by_freq: bool,
        chunk: int,
    ) -> None: ...

    @abstractmethod
    def _counts(self, ids: Tensor, counts: Tensor) -> None: ...


def chunk_size(num_keys: int, embedding_dim: int, acc_bytes: int) -> int:
    """Keys a chunk: short for parallelism, longer where the partial sums would take too much memory.

    Those of all levels above the first together take a fifteenth of the first's.
    """
    partial_bytes = embedding_dim * acc_bytes + 8 + 4  # sum, key, count
    chunk = CHUNK
    while chunk < num_keys and 2 * cdiv(num_keys, chunk) * partial_bytes > MAX_PARTIAL_BYTES:
        chunk *= 2
    return chunk
