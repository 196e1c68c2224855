"""Launch of the kernel that makes sort keys."""

from torch import Tensor

from .._plan.access import cdiv
from .._plan.sort import SortPlan
from .device import TritonDevice
from .launch import SORT_KEYS


class TritonSort(TritonDevice, SortPlan):
    """Sort keys of ids."""

    def _sort_keys(
        self,
        ids: Tensor,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
    ) -> None:
        self._launch(
            self._kernels.sort_keys,
            (cdiv(ids.numel(), SORT_KEYS.BLOCK),),
            ids.device,
            ids,
            keys,
            ids.numel(),
            num_embeddings,
            padding_idx,
            **SORT_KEYS.settings,
        )
