"""Stochastic gradient descent."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..dtypes import accumulation
from ..row_update import RowUpdate, StateLayout
from .row_optimizer import Params, RowOptimizer, check_number

BUFFER = "momentum_buffer"


class SGD(RowOptimizer):
    """Stochastic gradient descent: `torch.optim.SGD`, on the rows that have a gradient.

    With g, a row's summed gradient::

        g = g + decay_touched_rows * w
        momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g
        w = w - lr * momentum_buffer

    The first line is left out where decay_touched_rows is 0, and the second where momentum is: w = w - lr * g.
    With nesterov, w = w - lr * (g + momentum * momentum_buffer).

    A row without a gradient keeps its momentum_buffer, neither moves nor decays; under `torch.optim.SGD` with
    dense gradients its buffer shrinks and moves it on. Where every row has a gradient at every step, the two are
    the same. torch's buffer of sparse gradients is never coalesced: it grows by the entries of each step.

    As in torch, the step that makes a table's momentum_buffer is not dampened: later ones are, also where a row
    has its first gradient.

    Args:
        params: tables, or param groups.
        lr: the learning rate, a float or a tensor of one element.
        momentum: how much of momentum_buffer a step keeps; 0: there is none.
        dampening: how much of a gradient momentum_buffer leaves out.
        nesterov: look one step of momentum ahead.
        decay_touched_rows: torch's weight_decay (L2), on the rows that have a gradient alone.
        maximize, stochastic_rounding, seed, rows: see `RowOptimizer`.

    State: the number of steps, and with momentum momentum_buffer, fp32 (fp64 for fp64 tables)
    `[num_embeddings, embedding_dim]`.

    Raises:
        ValueError: beside `RowOptimizer`'s, in torch's words, for nesterov without momentum or with dampening.
    """

    formula = "momentum"
    torch_only: ClassVar = {"weight_decay": 0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        *,
        nesterov: bool = False,
        decay_touched_rows: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        rows: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "decay_touched_rows": decay_touched_rows,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def _check_numbers(self, group: Mapping[str, Any]) -> None:
        super()._check_numbers(group)
        check_number("dampening", group["dampening"])
        if math.isnan(group["dampening"]):
            raise ValueError(f"Invalid dampening: {group['dampening']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _formula(self, group: dict[str, Any]) -> str:
        if not group["momentum"]:
            return "sgd"
        return "nesterov" if group["nesterov"] else "momentum"

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        return RowUpdate(
            self._formula(group),
            step_size=lr,
            avg_weight=1 - float(group["dampening"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["decay_touched_rows"]),
        )

    def _begun(self, update: RowUpdate) -> RowUpdate:
        # As in torch, the gradient that makes momentum_buffer is not dampened.
        return update._replace(avg_weight=1.0)

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        is_dampened = bool(group["momentum"] and group["dampening"])
        return is_dampened or super()._depends_on_step(group)

    def _states_to_load(
        self,
        saved_groups: list[dict[str, Any]],
        states: dict[Tensor, dict[str, Any]],
        left_out: list[str],
    ) -> dict[Tensor, dict[str, Any]]:
        # torch's buffer of sparse gradients has every entry of every step.
        for param, state in states.items():
            buffer = state.get(BUFFER)
            if isinstance(buffer, Tensor) and buffer.is_sparse:
                state[BUFFER] = buffer.to(accumulation(param.dtype)).to_dense()
        loaded = super()._states_to_load(saved_groups, states, left_out)
        for state in loaded.values():
            if state[BUFFER] is None:
                del state[BUFFER]
            else:
                # torch counts no steps, but has made the buffer by one.
                state["step"] = max(state.get("step", 0), 1)
        return loaded

    def _check_shape(self, value: Any, layout: StateLayout, param: Tensor) -> None:
        # Without momentum there is none, and torch saves None for it.
        if value is not None:
            super()._check_shape(value, layout, param)
