"""Launches of the row-wise optimizers."""

import torch
from torch import Tensor

from ...dtypes import accumulation
from ...row_update import RowUpdate
from .._plan.access import VECTOR_BYTES, cdiv, vector_width
from .._plan.carries import Carries, Runs
from .._plan.row_update import RowUpdatePlan, rowwise_numbers, update_numbers
from .device import TritonDevice
from .launch import MAX_HELD_ROW, ROWWISE_BLOCK, carry_vector, next_power_of_2, update_launch


class TritonRowUpdate(TritonDevice, RowUpdatePlan):
    """One optimizer step of the rows that a batch touched."""

    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None:
        launch = self._launches[ids.device].select_rows
        self._launch(
            self._kernels.select_rows,
            (cdiv(ids.numel(), launch.BLOCK),),
            ids.device,
            ids,
            rows,
            chosen,
            ids.numel(),
            rows.numel(),
            **launch.settings,
        )

    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        return embedding_dim * acc_dtype.itemsize <= MAX_HELD_ROW

    def _row_update(
        self,
        update: RowUpdate,
        runs: Runs,
        weight: Tensor,
        state: tuple[Tensor, ...],
        carries: Carries,
        join: bool,
    ) -> None:
        values, _, keys = runs
        num_embeddings, embedding_dim = weight.shape
        acc_bytes = accumulation(weight.dtype).itemsize
        # State, of the accumulation dtype, is to be read in one access too.
        vec = min(vector_width(values), vector_width(weight), VECTOR_BYTES // acc_bytes)
        held_bytes = acc_bytes if update.formula == "rowwise_adagrad" else 0
        walk = self._launches[keys.device].row_update
        lane = carry_vector(vec, acc_bytes) if join else vec
        launch = update_launch(walk, embedding_dim, lane, held_bytes)
        self._launch(
            self._kernels.row_update,
            (cdiv(carries.num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
            keys.device,
            *runs,
            weight,
            *(*state, None, None)[:2],
            carries.partial,
            update.lr,
            keys.numel(),
            num_embeddings,
            carries.chunk_size,
            values.stride(0) // vec,
            values.stride(1),
            weight.stride(0) // vec,
            weight.stride(1),
            *update_numbers(update),
            D=embedding_dim,
            VEC=vec,
            FORMULA=update.formula,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            DECAYS_WEIGHT=update.weight_decay != 0,
            JOIN=join,
            **launch.settings,
            **self._unfused,
        )

    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        self._launch(
            self._kernels.rowwise_adagrad,
            (keys.numel(),),
            keys.device,
            total,
            keys,
            weight,
            state,
            update.lr,
            num_embeddings,
            *weight.stride(),
            *rowwise_numbers(update),
            D=embedding_dim,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            DECAYS_WEIGHT=update.weight_decay != 0,
            BLOCK_D=min(next_power_of_2(embedding_dim), ROWWISE_BLOCK),
            **self._unfused,
        )
