"""Rows scaled down to a norm, in place."""

from abc import abstractmethod

from torch import Tensor

from .sort import SortPlan


class RenormPlan(SortPlan):
    """`embedding_renorm_` of a `Backend`."""

    def embedding_renorm_(
        self, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
    ) -> None:
        keys, _ = self._sorted_keys(indices, weight.shape[0], padding_idx=-1)
        self._renorm(weight, keys, float(max_norm), float(norm_type))

    @abstractmethod
    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None: ...


def norm_name(norm_type: float) -> str:
    """Which of renorm_kernel's formulas computes this norm."""
    special = {float("inf"): "inf", float("-inf"): "-inf", 0.0: "0", 1.0: "1", 2.0: "2"}
    return special.get(norm_type, "p")
