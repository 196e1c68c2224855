"""Optimizer steps of the rows that a batch touched."""

from abc import abstractmethod

import torch
from torch import Tensor

from ...dtypes import accumulation
from ...row_update import RowUpdate
from .access import flat_ids, rows_of_keys
from .carries import Carries, Runs, cut
from .gradient import GradientPlan


class RowUpdatePlan(GradientPlan):
    """`row_update_` of a `Backend`."""

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
    ) -> None:
        ids = flat_ids(indices)
        if rows is not None:
            chosen = torch.empty_like(ids)
            self._select_rows(ids, rows.view(torch.uint8), chosen)
            ids = chosen
        keys, order = self._sorted_keys(ids, weight.shape[0], padding_idx=-1)
        if update.formula == "rowwise_adagrad" and not self._holds_row(
            weight.shape[1], accumulation(weight.dtype)
        ):
            total, run_keys = self._sums_of_runs(values, order, keys, weight.shape[0])
            self._rowwise_adagrad(update, total, run_keys, weight, state[0])
            return
        # `_sum_runs`, but each complete sum updates its row instead of being stored.
        carries = cut(keys, weight.shape[1], accumulation(weight.dtype))
        for join in carries.launches:
            self._row_update(update, Runs(values, order, keys), weight, state, carries, join)

    def _sums_of_runs(
        self, values: Tensor, order: Tensor, keys: Tensor, num_embeddings: int
    ) -> tuple[Tensor, Tensor]:
        """The sums of values [N, D] of each run, one after another, and the row of each; for row-wise Adagrad.

        There are as many of both as there are keys; behind the last run rows are num_embeddings.
        """
        runs = torch.zeros_like(keys, dtype=torch.int64)
        torch.cumsum(keys[1:] != keys[:-1], 0, out=runs[1:])
        run_keys = torch.full_like(runs, num_embeddings)
        run_keys.scatter_(0, runs, rows_of_keys(keys))
        total = torch.zeros(
            (keys.numel(), values.shape[1]),
            dtype=accumulation(values.dtype),
            device=values.device,
        )
        self._sum_runs(Runs(values, order, runs), None, total, scale_grad_by_freq=False)
        return total, run_keys

    @abstractmethod
    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None: ...

    @abstractmethod
    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        """Whether a program of `_row_update` sees a row as a whole."""

    @abstractmethod
    def _row_update(
        self,
        update: RowUpdate,
        runs: Runs,
        weight: Tensor,
        state: tuple[Tensor, ...],
        carries: Carries,
        join: bool,
    ) -> None: ...

    @abstractmethod
    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None: ...


def update_numbers(update: RowUpdate) -> tuple[float | int, ...]:
    """Scalar arguments of the row-update kernels, from step_size on."""
    return (
        float(update.step_size),
        float(update.decay),
        float(update.eps),
        float(update.avg_weight),
        float(update.sq_weight),
        float(update.momentum),
        float(update.weight_decay),
        float(update.grad_scale),
        *(update.stream or (0, 0)),
    )


def rowwise_numbers(update: RowUpdate) -> tuple[float | int, ...]:
    """Scalar arguments of the rowwise_adagrad kernels, from step_size on."""
    return (
        float(update.step_size),
        float(update.eps),
        float(update.weight_decay),
        float(update.grad_scale),
        *(update.stream or (0, 0)),
    )
