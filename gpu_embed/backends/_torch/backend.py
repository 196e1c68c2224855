"""torch's own operators: CPU tensors, and CUDA where no kernel of ours can run."""

from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from ...bounds import BoundsRecord
from ...row_update import RowUpdate
from ...tables.batch import TableBatch, write_out_of_range
from ...tables.entries import TableEntries
from . import tables
from .bag import TorchBags
from .row_update import row_update_, table_row_update_
from .take import TorchTake


class TorchBackend(TorchBags, TorchTake):
    """`Backend` on torch's operators. Runs everywhere."""

    name = "torch"

    def unusable_reason(self, device: torch.device) -> str | None:
        return None

    @cached_property
    def _tables_cpu(self) -> ModuleType:
        # Not before: it would be a third of a first lookup's time.
        from . import tables_cpu

        return tables_cpu

    def table_batched_embedding(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> Tensor:
        if weight.device.type == "cpu":
            output = self._tables_cpu.embedding(weight, per_sample_weights, batch, zero_padding)
            if output is not None:
                return output
        places = batch.places()
        if record is not None:
            write_out_of_range(record, batch, places)
        return tables.embedding(weight, per_sample_weights, batch, zero_padding, places)

    def table_batched_embedding_max(
        self,
        weight: Tensor,
        batch: TableBatch,
        with_argmax: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        if weight.device.type == "cpu":
            found = self._tables_cpu.embedding_max(weight, batch, with_argmax)
            if found is not None:
                return found
        places = batch.places()
        if record is not None:
            write_out_of_range(record, batch, places)
        return tables.embedding_max(weight, batch, with_argmax, places)

    def table_batched_embedding_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        weight_shape: tuple[int, ...],
        into: Tensor | None = None,
    ) -> Tensor:
        inputs = grad_output, per_sample_weights, batch, weight_shape, into
        if grad_output.device.type == "cpu":
            gradient = self._tables_cpu.dense_backward(*inputs)
            if gradient is not None:
                return gradient
        return tables.dense_backward(*inputs)

    def table_batched_embedding_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, batch: TableBatch
    ) -> Tensor:
        if weight.device.type == "cpu":
            gradient = self._tables_cpu.sample_weights_backward(grad_output, weight, batch)
            if gradient is not None:
                return gradient
        return tables.sample_weights_backward(grad_output, weight, batch)

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
    ) -> None:
        row_update_(update, weight, state, indices, values, rows)

    def table_row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        entries: TableEntries,
        rows: Tensor | None,
    ) -> None:
        table_row_update_(update, weight, state, entries, rows)
