"""Launch of the kernel that makes sort keys."""

from torch import Tensor

from ...shard import NO_SHARD, Shard
from .._plan.access import cdiv
from .._plan.sort import SortPlan
from .device import TritonDevice


class TritonSort(TritonDevice, SortPlan):
    """Sort keys of ids."""

    def _sort_keys(
        self,
        ids: Tensor,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
        shard: Shard | None,
    ) -> None:
        launch = self._launches[ids.device].sort_keys
        self._launch(
            self._kernels.sort_keys,
            (cdiv(ids.numel(), launch.BLOCK),),
            ids.device,
            ids,
            keys,
            ids.numel(),
            num_embeddings,
            *(shard or NO_SHARD),
            padding_idx,
            **launch.settings,
        )
