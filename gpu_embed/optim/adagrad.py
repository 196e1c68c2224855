"""Adagrad, with a sum of squares for each element or for each row."""

from typing import Any, ClassVar

from torch import Tensor

from ..row_update import RowUpdate
from .row_optimizer import Params, RowOptimizer


class Adagrad(RowOptimizer):
    """Adagrad: `torch.optim.Adagrad` on a sparse gradient.

    With g, a row's summed gradient, and t, the number of this step, from 1 on::

        g = g + decay_touched_rows * w
        sum = sum + g * g
        w = w - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    The first line is left out where decay_touched_rows is 0. A row without a gradient neither moves nor decays.

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        lr_decay: how fast the learning rate falls with the steps.
        initial_accumulator_value: what every sum begins with.
        eps: keeps the denominator from 0.
        decay_touched_rows: torch's weight_decay (L2), on the rows that have a gradient alone.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: sum, fp32 (fp64 for fp64 tables) `[num_embeddings, embedding_dim]`. torch's weight_decay does not
    go with sparse gradients.
    """

    formula = "adagrad"
    torch_only: ClassVar = {"weight_decay": 0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        decay_touched_rows: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "decay_touched_rows": decay_touched_rows,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        step_size = lr / (1 + (step - 1) * group["lr_decay"])
        return RowUpdate(
            self.formula,
            step_size,
            eps=float(group["eps"]),
            weight_decay=float(group["decay_touched_rows"]),
        )

    def _initial_state(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        return bool(group["lr_decay"]) or super()._depends_on_step(group)


class RowWiseAdagrad(Adagrad):
    """Adagrad with one sum a row: FBGEMM's EXACT_ROWWISE_ADAGRAD.

    With g, a row's summed gradient `[embedding_dim]`, and t, the number of this step, from 1 on::

        g = g + decay_touched_rows * w
        sum = sum + mean(g * g)
        w = w - lr / (1 + (t - 1) * lr_decay) / (sqrt(sum) + eps) * g

    The first line is left out where decay_touched_rows is 0. A row without a gradient neither moves nor decays.

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        lr_decay: how fast the learning rate falls with the steps.
        initial_accumulator_value: what every sum begins with.
        eps: keeps the denominator from 0.
        decay_touched_rows: torch's weight_decay (L2), on the rows that have a gradient alone.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: sum, fp32 (fp64 for fp64 tables) `[num_embeddings]`: a table of 10 million rows of 128 keeps 40 MB
    where Adagrad keeps 5 GB.
    """

    formula = "rowwise_adagrad"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-8,
        decay_touched_rows: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            decay_touched_rows=decay_touched_rows,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            rows=rows,
        )
