"""The ids in ascending order, with the position that each came from."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .access import flat_ids, sort_key_dtype

# torch.sort counts positions in 32 bits on CUDA.
MAX_SORTED_IDS = 2**31 - 1


class SortPlan(ABC):
    """Sorted keys, which the sorted gradient, row updates and renorm walk."""

    def _sorted_keys(
        self, indices: Tensor, num_embeddings: int, padding_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The ids [N] in ascending order, and the position (int64) that each came from.

        Stable, or the order of the additions would change from run to run. Ids out of range and padding
        become num_embeddings, so they come last.
        """
        check_sortable(indices.numel())
        ids = flat_ids(indices)
        keys = ids.new_empty(ids.numel(), dtype=sort_key_dtype(num_embeddings))
        self._sort_keys(ids, keys, num_embeddings, padding_idx)
        # Where the ids are a copy, they make room.
        del ids
        keys, order = torch.sort(keys, stable=True)
        return keys, order

    @abstractmethod
    def _sort_keys(
        self, ids: Tensor, keys: Tensor, num_embeddings: int, padding_idx: int
    ) -> None: ...


def check_sortable(num_ids: int) -> None:
    """Raise NotImplementedError if torch.sort cannot sort this many ids."""
    if num_ids > MAX_SORTED_IDS:
        raise NotImplementedError(
            "gpu_embed: this gradient, update or max_norm sorts the ids, and torch.sort takes at most "
            f"{MAX_SORTED_IDS}; got {num_ids}. Split the batch"
        )
