"""Launches of the row-wise optimizers."""

import torch
from torch import Tensor

from ...row_update import RowUpdate
from .._plan.access import vector_width
from .._plan.carries import Carries, Runs
from .._plan.row_update import RowUpdatePlan, rowwise_numbers, update_numbers
from .device import FLOATS, CupyDevice
from .launch import MAX_SEGMENT_VECTOR, ROWWISE_ADAGRAD
from .nvrtc import Kernel

# In the order of the enum in update.cuh.
FORMULAS = ("sgd", "momentum", "nesterov", "adagrad", "adam")


class CupyRowUpdate(CupyDevice, RowUpdatePlan):
    """One optimizer step of the rows that a batch touched."""

    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None:
        self._launch(
            Kernel("row_update", "select_rows_kernel"),
            *self._launches[ids.device].select_rows.grid(ids.numel()),
            ids.device,
            ids,
            rows,
            chosen,
            ids.numel(),
            rows.numel(),
        )

    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        return False

    def _row_update(
        self,
        update: RowUpdate,
        runs: Runs,
        weight: Tensor,
        state: tuple[Tensor, ...],
        carries: Carries,
        join: bool,
    ) -> None:
        values, order, keys = runs
        num_embeddings, embedding_dim = weight.shape
        launch = self._launches[keys.device].row_update
        widths = (vector_width(matrix) for matrix in (values, weight, *state))
        vec = min(*widths, MAX_SEGMENT_VECTOR)
        arguments = f"{FLOATS[values.dtype]}, {FLOATS[weight.dtype]}, {vec}, {launch.UNROLL}"
        self._launch(
            Kernel("row_update", f"row_update_kernel<{arguments}>"),
            *launch.grid(carries.num_chunks * (embedding_dim // vec)),
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
            weight.stride(0),
            weight.stride(1),
            *update_numbers(update),
            embedding_dim,
            FORMULAS.index(update.formula),
            int(update.rounds_at_random(weight.dtype)),
            int(join),
            order.element_size(),
            keys.element_size(),
        )

    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        vec = min(vector_width(total), vector_width(weight), MAX_SEGMENT_VECTOR)
        self._launch(
            Kernel("row_update", f"rowwise_adagrad_kernel<{FLOATS[weight.dtype]}, {vec}>"),
            *ROWWISE_ADAGRAD.grid(keys.numel()),
            keys.device,
            total,
            keys,
            weight,
            state,
            update.lr,
            num_embeddings,
            *weight.stride(),
            *rowwise_numbers(update),
            embedding_dim,
            int(update.rounds_at_random(weight.dtype)),
            keys.numel(),
        )
