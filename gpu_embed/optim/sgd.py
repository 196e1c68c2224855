"""Stochastic gradient descent."""

from typing import Any, ClassVar

from torch import Tensor

from ..row_update import RowUpdate
from .row_optimizer import Params, RowOptimizer, check_lr


class SGD(RowOptimizer):
    """Stochastic gradient descent without momentum: `torch.optim.SGD` on a sparse gradient.

    With g, a row's summed gradient::

        w = w - lr * g

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: the number of steps alone.
    """

    formula = "sgd"
    torch_only: ClassVar = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        check_lr(lr)
        defaults = {
            "lr": lr,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        return RowUpdate(self.formula, step_size=lr)
