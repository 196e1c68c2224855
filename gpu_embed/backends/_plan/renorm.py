"""Rows scaled down to a norm, in place."""

from abc import abstractmethod

from torch import Tensor

from ...shard import Shard
from .sort import SortPlan


class RenormPlan(SortPlan):
    """`embedding_renorm_` of a `Backend`."""

    def embedding_renorm_(
        self,
        weight: Tensor,
        indices: Tensor,
        max_norm: float,
        norm_type: float,
        shard: Shard | None = None,
    ) -> None:
        num_rows = weight.shape[0]
        keys, _ = self._sorted_keys(indices, num_rows, padding_idx=-1, shard=shard)
        last_valid_key = num_rows - 1 if shard is None else num_rows
        self._renorm(weight, keys, last_valid_key, float(max_norm), float(norm_type))

    @abstractmethod
    def _renorm(
        self, weight: Tensor, keys: Tensor, last_valid_key: int, max_norm: float, norm_type: float
    ) -> None:
        """Scale the rows that sorted keys name, unless there is a key behind last_valid_key."""


def norm_name(norm_type: float) -> str:
    """Which of renorm_kernel's formulas computes this norm."""
    special = {float("inf"): "inf", float("-inf"): "-inf", 0.0: "0", 1.0: "1", 2.0: "2"}
    return special.get(norm_type, "p")
