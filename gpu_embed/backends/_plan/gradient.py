"""The dense gradient of a lookup: atomics, or sums of the runs of sorted ids."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes import accumulation
from ...shard import Shard
from .access import RowSteps, flat_ids, row_matrix, row_numbers
from .carries import Carries, Runs, cut
from .gradient_method import choose
from .in_force import InForce
from .sort import SortPlan


class OutputBags(NamedTuple):
    """Which row of grad_output is the gradient of each position, and how it is scaled."""

    bag_of: Tensor  # [N]: the position's bag, a row of grad_output; -1: none
    per_sample_weights: Tensor | None  # [N]: multiplies that row
    sizes: Tensor | None  # int32 [B]: divides that row


# Position n has row n, as it is.
NO_BAGS = (None, None, None)


class GradientPlan(SortPlan):
    """`embedding_dense_backward` and `embedding_counts` of a `Backend`."""

    _methods: InForce[Any]  # of the backend's own `Methods`

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        matrix, steps = row_matrix(grad_output)
        return self._dense_backward(
            matrix,
            steps,
            indices,
            None,
            num_embeddings,
            padding_idx,
            scale_grad_by_freq,
            into,
            shard,
        )

    def _dense_backward(
        self,
        grad_output: Tensor,
        steps: list[RowSteps],
        indices: Tensor,
        make_output_bags: Callable[[], OutputBags] | None,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        into: Tensor | None,
        shard: Shard | None,
    ) -> Tensor:
        """Rows of grad_output [*, D], one a position unless there are bags, summed over each id's positions.

        `steps` lead from one position's row to the next, as `row_matrix` says.
        """
        in_place, grad_weight = into is not None, into
        if grad_weight is None:
            grad_weight = grad_output.new_zeros((num_embeddings, grad_output.shape[1]))
        method = choose(
            indices.numel(),
            num_embeddings,
            grad_weight.dtype,
            torch.are_deterministic_algorithms_enabled(),
            scale_grad_by_freq,
            self._methods[indices.device].gradient,
        )
        if method == "atomic":
            ids = flat_ids(indices)
            bags = make_output_bags() if make_output_bags else None
            rows = row_numbers(steps, indices.device)
            if rows is not None:
                bags = OutputBags(rows, None, None)
            self._scatter_add(grad_output, ids, bags, grad_weight, padding_idx, in_place, shard)
            return grad_weight
        keys, order = self._sorted_keys(indices, num_embeddings, padding_idx, shard)
        # Not made before the sort has freed its memory.
        bags = make_output_bags() if make_output_bags else None
        rows = row_numbers(steps, indices.device)
        if rows is not None:
            order = rows.index_select(0, order)
            del rows
        runs = Runs(grad_output, order, keys)
        atomic = method == "sorted_atomic"
        self._sum_runs(
            runs, bags, grad_weight, scale_grad_by_freq, atomic=atomic, in_place=in_place
        )
        return grad_weight

    def embedding_counts(
        self, indices: Tensor, num_embeddings: int, shard: Shard | None = None
    ) -> Tensor:
        counts = torch.zeros(num_embeddings, dtype=torch.int32, device=indices.device)
        self._counts(flat_ids(indices), counts, shard)
        return counts

    def _sum_runs(
        self,
        runs: Runs,
        bags: OutputBags | None,
        grad_weight: Tensor,
        scale_grad_by_freq: bool,
        *,
        atomic: bool = False,
        in_place: bool = False,
    ) -> None:
        dim, dtype = grad_weight.shape[1], accumulation(grad_weight.dtype)
        carries = cut(runs.keys, dim, dtype, counted=scale_grad_by_freq, atomic=atomic)
        for join in carries.launches:
            self._segment_sum(runs, bags, grad_weight, carries, scale_grad_by_freq, join, in_place)
            bags = None

    @abstractmethod
    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        bags: OutputBags | None,
        grad_weight: Tensor,
        padding_idx: int,
        in_place: bool,
        shard: Shard | None = None,
    ) -> None:
        """Add each position's row to its id's row of grad_weight.

        `in_place`: grad_weight has any strides. Else it is contiguous, and as aligned as an allocation.
        """

    @abstractmethod
    def _segment_sum(
        self,
        runs: Runs,
        bags: OutputBags | None,
        grad_weight: Tensor,
        carries: Carries,
        scale_grad_by_freq: bool,
        join: bool,
        in_place: bool,
    ) -> None:
        """Store the sums of the runs within a chunk, and the others' carries; `join`: the sums of those.

        `in_place`: a sum is added to its row of grad_weight, as `_scatter_add`'s. Else it is stored, and grad_weight
        is zero on entry.
        """

    @abstractmethod
    def _counts(self, ids: Tensor, counts: Tensor, shard: Shard | None) -> None: ...
