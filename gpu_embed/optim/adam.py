"""Adam and AdamW, whose moments are updated where a row has a gradient."""

import math
from typing import Any, ClassVar

from torch import Tensor

from ..row_update import RowUpdate
from .row_optimizer import Params, RowOptimizer


class Adam(RowOptimizer):
    """Adam with lazily updated moments: `torch.optim.SparseAdam`.

    With g, a row's summed gradient, and t, the number of this step of the whole table, from 1 on::

        exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
        exp_avg_sq = exp_avg_sq + (1 - beta2) * (g * g - exp_avg_sq)
        w = w - lr * sqrt(1 - beta2**t) / (1 - beta1**t) * exp_avg / (sqrt(exp_avg_sq) + eps)

    A row without a gradient keeps its moments: they do not decay, as they would under `torch.optim.Adam`.
    And eps stands beside the uncorrected root, as in SparseAdam.

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        betas: how much of each moment a step keeps.
        eps: keeps the denominator from 0.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: exp_avg and exp_avg_sq, fp32 (fp64 for fp64 tables) `[num_embeddings, embedding_dim]`.
    """

    formula = "adam"
    torch_only: ClassVar = {"weight_decay": 0, "amsgrad": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        beta1, beta2 = map(float, group["betas"])
        return RowUpdate(
            self.formula,
            step_size=lr * math.sqrt(1 - beta2**step) / (1 - beta1**step),
            eps=float(group["eps"]),
            avg_weight=1 - beta1,
            sq_weight=1 - beta2,
        )

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        return True


class AdamW(RowOptimizer):
    """AdamW on the rows that have a gradient: `torch.optim.AdamW`, and nothing at all on the others.

    With g, a row's summed gradient, and t, the number of this step of the whole table, from 1 on::

        w = w * (1 - lr * weight_decay)
        exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
        exp_avg_sq = exp_avg_sq + (1 - beta2) * (g * g - exp_avg_sq)
        w = w - lr / (1 - beta1**t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps)

    A row without a gradient neither decays nor moves. Where every row has one, this is `torch.optim.AdamW`.

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        betas: how much of each moment a step keeps.
        eps: keeps the denominator from 0; beside the corrected root, unlike `Adam`'s.
        weight_decay: how much of lr pulls a row to 0.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: exp_avg and exp_avg_sq, fp32 (fp64 for fp64 tables) `[num_embeddings, embedding_dim]`.
    """

    formula = "adam"
    torch_only: ClassVar = {"amsgrad": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        beta1, beta2 = map(float, group["betas"])
        root_correction = math.sqrt(1 - beta2**step)
        # The formula has the uncorrected root, so both sides of the quotient take the correction.
        return RowUpdate(
            self.formula,
            step_size=lr * root_correction / (1 - beta1**step),
            eps=float(group["eps"]) * root_correction,
            decay=lr * group["weight_decay"],
            avg_weight=1 - beta1,
            sq_weight=1 - beta2,
        )

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        return True
