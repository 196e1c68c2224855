"""Lookups with Keras's rules in torch's operators."""

import torch
from torch import Tensor

from ...bounds import BoundsRecord, in_table
from ...dtypes import TORCH_IDS, accumulation
from ...take import QuantizedTable, wrap_negative
from .lookup import TorchLookup


class TorchTake(TorchLookup):
    """Lookups whose ids are cast and wrapped, and whose rows are converted."""

    def take_rows(
        self, weight: Tensor, indices: Tensor, dtype: torch.dtype, record: BoundsRecord | None
    ) -> Tensor:
        if not weight.is_cuda and indices.dtype in TORCH_IDS:
            # Negative ids are rare, and torch's CPU kernel finds them.
            try:
                return torch.embedding(weight, indices).to(dtype)
            except IndexError:
                pass
        rows = wrap_negative(indices, weight.shape[0])
        return self._embedding(weight, rows, -1, record, -weight.shape[0]).to(dtype)

    def dequantize_rows(
        self,
        table: QuantizedTable,
        indices: Tensor,
        dtype: torch.dtype,
        record: BoundsRecord | None,
    ) -> Tensor:
        num_embeddings = table.values.shape[0]
        rows = wrap_negative(indices, num_embeddings)
        columns = self._embedding(table.values, rows, -1, record, -num_embeddings)
        if table.bits == 4:
            halves = torch.stack([columns & 15, columns >> 4 & 15], dim=-1).flatten(-2)
            columns = (halves[..., : table.embedding_dim] ^ 8) - 8

        def of_groups(numbers: Tensor) -> Tensor:
            """One number a group of each row -> one a column."""
            per_group = self.embedding(numbers.reshape(num_embeddings, -1), rows, -1, None)
            per_column = per_group.repeat_interleave(table.group_size, dim=-1)
            return per_column[..., : table.embedding_dim].to(wide)

        wide = accumulation(table.scale.dtype)
        numbers = columns.to(wide)
        if table.zero is None:
            # What an id out of range reads as divides zeros by zeros.
            scale = of_groups(table.scale)
            read = in_table(rows, num_embeddings)[..., None]
            return torch.where(read, numbers / scale, 0).to(dtype)
        return ((numbers - of_groups(table.zero)) * of_groups(table.scale)).to(dtype)
