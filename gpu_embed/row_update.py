"""One optimizer step of one table, as every backend is told of it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """Where the random bits of a step's stochastic rounding come from: Philox 4x32-10.

    The element in column d of row r takes word d % 4 of the block with the key `seed` and the counter
    (d // 4, r mod 2**32, r // 2**32, step), so it depends on neither the backend nor the launch.
    """

    seed: int  # [0, 2**63)
    step: int  # [0, 2**32)


class RowUpdate(NamedTuple):
    """What becomes of a row w and its state, given g: `grad_scale` times the row's summed gradient.

    Every operation is rounded to fp32 (fp64 for fp64 tables), in the order written; no multiplication and
    addition are fused. Only w is then rounded to the table's dtype. Unless weight_decay is 0, each begins with
    g = g + weight_decay * w. The formulas:

    * "sgd", no state:
      w = w - step_size * g
    * "momentum", state momentum_buffer [V, D]:
      momentum_buffer = momentum_buffer * momentum + g * avg_weight
      w = w - step_size * momentum_buffer
    * "nesterov", state momentum_buffer [V, D]:
      momentum_buffer = momentum_buffer * momentum + g * avg_weight
      w = w - step_size * (g + momentum_buffer * momentum)
    * "adagrad", state sum [V, D]:
      sum = sum + g * g
      w = w - step_size * (g / (sqrt(sum) + eps))
    * "rowwise_adagrad", state sum [V]:
      sum = sum + total(g * g) / D
      w = w - (step_size / (sqrt(sum) + eps)) * g
    * "adam", state exp_avg, exp_avg_sq [V, D]:
      exp_avg = exp_avg + (g - exp_avg) * avg_weight
      exp_avg_sq = exp_avg_sq + (g * g - exp_avg_sq) * sq_weight
      w = w * (1 - decay)
      w = w - step_size * (exp_avg / (sqrt(exp_avg_sq) + eps))

    Attributes:
        lr: None, or fp64 [1] on the table's device, which then multiplies step_size and decay.
        stream: None: w is rounded to nearest, ties to even. Else 16-bit tables are rounded up or down at
            random, with the probability that makes the mean right.
    """

    formula: str
    step_size: float
    eps: float = 0.0
    decay: float = 0.0
    avg_weight: float = 0.0  # 1 - beta1, or 1 - dampening
    sq_weight: float = 0.0  # 1 - beta2
    momentum: float = 0.0
    weight_decay: float = 0.0
    grad_scale: float = 1.0
    lr: Tensor | None = None
    stream: Stream | None = None

    def rounds_at_random(self, dtype: torch.dtype) -> bool:
        """Whether a table of this dtype is rounded so."""
        return self.stream is not None and dtype.itemsize == 2


class StateLayout(NamedTuple):
    """One tensor of state a formula keeps: a number for each element of the table, or for each row."""

    name: str
    per_row: bool = False

    def shape(self, weight: Tensor, num_rows: int) -> torch.Size:
        """Its shape for a table of so many rows."""
        return torch.Size([num_rows]) if self.per_row else weight.shape


# The state of each formula, in the order in which backends take it; torch's names.
STATE = {
    "sgd": (),
    "momentum": (StateLayout("momentum_buffer"),),
    "nesterov": (StateLayout("momentum_buffer"),),
    "adagrad": (StateLayout("sum"),),
    "rowwise_adagrad": (StateLayout("sum", per_row=True),),
    "adam": (StateLayout("exp_avg"), StateLayout("exp_avg_sq")),
}
