"""Stochastic gradient descent."""

from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..row_update import RowUpdate, StateLayout, arithmetic_dtype
from .row_optimizer import Params, RowOptimizer, check_lr, check_not_negative

BUFFER = "momentum_buffer"


class _Update(NamedTuple):
    """What is particular to one table's update."""

    formula: str
    dampening: float


# Outside of updates, as in loading, what counts is all state that a table may have.
_NO_UPDATE = _Update("momentum", 0.0)
# Several threads of one backward pass may each update a table.
_current_update = ContextVar("_current_update", default=_NO_UPDATE)


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
        check_lr(lr)
        check_not_negative("momentum value", momentum)
        check_not_negative("decay_touched_rows value", decay_touched_rows)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
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

    @property
    def formula(self) -> str:  # type: ignore[override]
        return _current_update.get().formula

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        token = _current_update.set(self._particulars(group, param))
        try:
            super()._update(group, param, grad)
        finally:
            _current_update.reset(token)

    def _particulars(self, group: dict[str, Any], param: Tensor) -> _Update:
        if not group["momentum"]:
            return _Update("sgd", 0.0)
        begins = BUFFER not in self.state.get(param, {})
        return _Update(
            "nesterov" if group["nesterov"] else "momentum",
            0.0 if begins else float(group["dampening"]),
        )

    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        formula, dampening = _current_update.get()
        return RowUpdate(
            formula,
            step_size=lr,
            avg_weight=1 - dampening,
            momentum=float(group["momentum"]),
            weight_decay=float(group["decay_touched_rows"]),
        )

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        # The step that makes momentum_buffer is the only one without dampening.
        undamped = _current_update.get().dampening != group["dampening"]
        return bool(group["momentum"] and undamped) or super()._depends_on_step(group)

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
                state[BUFFER] = buffer.to(arithmetic_dtype(param.dtype)).to_dense()
        loaded = super()._states_to_load(saved_groups, states, left_out)
        for state in loaded.values():
            if state[BUFFER] is None:
                del state[BUFFER]
        return loaded

    def _check_shape(self, value: Any, layout: StateLayout, param: Tensor) -> None:
        # Without momentum there is none, and torch saves None for it.
        if value is not None:
            super()._check_shape(value, layout, param)
