"""Launch of the kernel that makes sort keys."""

from torch import Tensor

from ...shard import Shard, shard_arguments
from .._plan.sort import SortPlan
from .device import CupyDevice, cpp_bool
from .nvrtc import Kernel


class CupySort(CupyDevice, SortPlan):
    """Sort keys of ids."""

    def _sort_keys(
        self,
        ids: Tensor,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
        shard: Shard | None,
    ) -> None:
        self._launch(
            Kernel("sort_keys", f"sort_keys_kernel<{cpp_bool(shard is not None)}>"),
            *self._launches[ids.device].sort_keys.grid(ids.numel()),
            ids.device,
            ids,
            keys,
            ids.numel(),
            num_embeddings,
            *shard_arguments(shard),
            padding_idx,
            ids.element_size(),
            keys.element_size(),
        )
