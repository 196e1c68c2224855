"""The ids in ascending order, with the position that each came from."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...shard import Shard
from .access import flat_ids, sort_key_dtype

# torch.sort counts positions in 32 bits on CUDA.
MAX_SORTED_IDS = 2**31 - 1


class SortPlan(ABC):
    """Sorted keys, which the sorted gradient, row updates and renorm walk."""

    def _sorted_keys(
        self,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The ids [N] in ascending order, and the position (int64) that each came from.

        Stable, or the order of the additions would change from run to run. Ids out of range and padding
        become num_embeddings, so they come last. With a shard, that stands for ids of other rows and padding, and
        num_embeddings + 1 for ids out of range.
        """
        check_sortable(indices.numel())
        ids = flat_ids(indices)
        largest = num_embeddings if shard is None else num_embeddings + 1
        keys = ids.new_empty(ids.numel(), dtype=sort_key_dtype(largest))
        self._sort_keys(ids, keys, num_embeddings, padding_idx, shard)
        # Where the ids are a copy, they make room.
        del ids
        keys, order = torch.sort(keys, stable=True)
        return keys, order

    @abstractmethod
    def _sort_keys(
        self,
        ids: Tensor,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
        shard: Shard | None,
    ) -> None: ...


def check_sortable(num_ids: int) -> None:
    """Raise NotImplementedError if torch.sort cannot sort this many ids."""
    if num_ids > MAX_SORTED_IDS:
        raise NotImplementedError(
            "gpu_embed: this gradient, update or max_norm sorts its ids (a maximum's gradient its output's "
            f"elements), and torch.sort takes at most {MAX_SORTED_IDS}; got {num_ids}. Split the batch, or "
            "update after fewer backwards"
        )
