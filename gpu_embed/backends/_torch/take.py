"""Lookups with Keras's rules in torch's operators."""

from functools import cache

import torch
from torch import Tensor

from ...bounds import BoundsRecord, all_in_table, in_table
from ...dtypes import TORCH_IDS, accumulation
from ...fused_rows import FusedRows, dequantize, reads_as_ours, torch_lookup
from ...take import QuantizedTable, wrap_negative
from .lookup import TorchLookup, torch_ids

# The numbers of groups in a row, which are few, are kept beside those of a batch's rows. Beyond the second limit they
# are made for each call: beside its rows they cost little.
MAX_GROUPS, MAX_KEPT = 64, 1 << 17


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
        if table.fused:
            fused_rows = _fused_rows(table, torch_ids(indices), record)
            return fused_rows if dtype == torch.float32 else fused_rows.to(dtype)
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


def _fused_rows(table: QuantizedTable, ids: Tensor, record: BoundsRecord | None) -> Tensor:
    """What fused rows stand for, fp32; zeros where an id is out of range. There are ids."""
    num_embeddings = table.values.shape[0]
    if not ids.is_cuda and all_in_table(ids, num_embeddings):
        if reads_as_ours(table.bits):
            return _fused_rows_by_operator(table, ids)
        return dequantize(table.values[ids], table.layout)
    if record is not None:
        record.write(ids, num_embeddings)
    if num_embeddings == 0:
        return table.values.new_zeros((*ids.shape, table.embedding_dim), dtype=torch.float32)
    read = in_table(ids, num_embeddings)
    rows = dequantize(table.values[torch.where(read, ids, 0)], table.layout)
    return torch.where(read[..., None], rows, 0)


def _fused_rows_by_operator(table: QuantizedTable, ids: Tensor) -> Tensor:
    """The same on the CPU, of ids in the table: a row of several groups is several rows to torch."""
    groups, group_bytes, group_size = _numbers_of(table.layout)
    weight, flat, width = table.values, ids, groups * group_size
    if groups > 1:
        weight = weight.view(-1, group_bytes)
        flat = flat.to(torch.int32 if len(weight) < 2**31 else torch.int64)
        flat = torch.add(_arange(groups, flat.dtype), flat.unsqueeze(-1), alpha=groups)
    flat = flat.reshape(-1)
    rows: Tensor = torch_lookup(table.bits)(weight, flat, _arange(flat.shape[0], flat.dtype))
    rows = rows.view(*ids.shape, width)
    dim = table.embedding_dim
    return rows if width == dim else rows[..., :dim].contiguous()


@cache
def _numbers_of(layout: FusedRows) -> tuple[int, int, int]:
    return layout.groups, layout.group_bytes, layout.group_size


# By dtype the last one that was made.
_kept: dict[tuple[torch.dtype, bool], Tensor] = {}


def _arange(count: int, dtype: torch.dtype) -> Tensor:
    """0, 1, ... up to count; kept for the next call, where it is most often the same."""
    key = dtype, count > MAX_GROUPS
    kept = _kept.get(key)
    if kept is None or kept.shape[0] != count:
        with torch.inference_mode(False):
            kept = torch.arange(count, dtype=dtype, device="cpu")
        if count <= MAX_KEPT:
            _kept[key] = kept
    return kept
