"""The NumPy reference behind the `Backend` protocol: any device, by way of host copies."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..bags import Bags
from ..bounds import BoundsRecord
from ..dtypes import accumulation
from ..reference import rounding as stochastic_rounding
from ..reference.bag import largest_of_bags
from ..row_update import STATE, RowUpdate
from ..shard import Shard, table_rows
from ..tables.batch import TableBatch, write_out_of_range
from ..tables.entries import TableEntries
from ..tables.layout import TableColumn
from ..take import QuantizedTable, wrap_negative
from .protocol import PreparedEmbedding

ROUNDINGS = {
    torch.bfloat16: stochastic_rounding.round_to_bfloat16,
    torch.float16: stochastic_rounding.round_to_float16,
}


class ReferenceBackend:
    """`Backend` on `gpu_embed.reference`. For checking, not for speed: CUDA tensors travel to the host."""

    name = "reference"

    def unusable_reason(self, device: torch.device) -> str | None:
        return None

    def embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        if indices.numel() == 0:
            return weight.new_empty(*indices.shape, weight.shape[1])
        if record is not None:
            record.write(indices, table_rows(weight.shape[0], shard))
        indices, zero_idx = _local(indices, weight.shape[0], zero_idx, shard)
        # NumPy does not know every dtype, but a lookup copies bytes.
        table = (
            weight.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            .view(torch.uint8)
            .numpy()
        )
        rows = reference.embedding(table, indices.cpu().numpy(), zero_idx)
        return torch.from_numpy(rows).view(weight.dtype).to(weight.device)

    def prepare_embedding(self, weight: Tensor, shard: Shard | None = None) -> PreparedEmbedding:
        return self.embedding if shard is None else partial(self.embedding, shard=shard)

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        indices, padding_idx = _local(indices, num_embeddings, padding_idx, shard)
        grad_weight = reference.embedding_dense_backward(
            grad_output.detach().cpu().double().numpy(),
            indices.cpu().numpy(),
            num_embeddings,
            padding_idx,
            scale_grad_by_freq,
        )
        return _gradient(grad_weight, grad_output, into)

    def embedding_renorm_(
        self,
        weight: Tensor,
        indices: Tensor,
        max_norm: float,
        norm_type: float,
        shard: Shard | None = None,
    ) -> None:
        if shard is not None:
            indices, _ = _local(indices, weight.shape[0], -1, shard)
            # Other shards' ids are no error; there may be none left.
            indices = indices[indices >= 0]
        table = weight.detach().cpu().double().numpy()
        renormed = reference.embedding_renorm(table, indices.cpu().numpy(), max_norm, norm_type)
        weight.copy_(torch.from_numpy(renormed))

    def embedding_counts(
        self, indices: Tensor, num_embeddings: int, shard: Shard | None = None
    ) -> Tensor:
        indices, _ = _local(indices, num_embeddings, -1, shard)
        counts = reference.embedding_counts(indices.cpu().numpy(), num_embeddings)
        return torch.from_numpy(counts).to(indices.device)

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
        first_row: int = 0,
    ) -> None:
        table = weight.detach().cpu().to(accumulation(weight.dtype)).clone().numpy()
        arrays = [tensor.cpu().clone().numpy() for tensor in state]
        reference.row_update(
            update,
            table,
            arrays,
            indices.cpu().numpy(),
            values.detach().cpu().double().numpy(),
            None if rows is None else rows.cpu().numpy(),
            ROUNDINGS.get(weight.dtype),
            first_row,
        )
        weight.copy_(torch.from_numpy(table))
        for tensor, array in zip(state, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        if record is not None:
            record.write_bags(bags, table_rows(weight.shape[0], shard))
        bags, padding_idx = _local_bags(bags, weight.shape[0], padding_idx, shard)
        output = reference.embedding_bag(
            _array(weight), *_bag_arrays(bags), padding_idx, mode, _array(per_sample_weights)
        )
        return torch.from_numpy(output).to(weight)

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_argmax: bool,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        if record is not None:
            record.write_bags(bags, table_rows(weight.shape[0], shard))
        if shard is None:
            output, argmax = reference.embedding_bag_max(
                _array(weight), *_bag_arrays(bags), padding_idx
            )
        else:
            bags, padding_idx = _local_bags(bags, weight.shape[0], padding_idx, shard)
            output, argmax = largest_of_bags(
                _array(weight), *_bag_arrays(bags), padding_idx, others_idx=-1
            )
        argmax = argmax if with_argmax else argmax[:0, 0]
        return torch.from_numpy(output).to(weight), torch.from_numpy(argmax).to(weight.device)

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        bags, padding_idx = _local_bags(bags, num_embeddings, padding_idx, shard)
        grad_weight = reference.embedding_bag_dense_backward(
            _array(grad_output),
            *_bag_arrays(bags),
            num_embeddings,
            padding_idx,
            mode,
            _array(per_sample_weights),
            scale_grad_by_freq,
        )
        return _gradient(grad_weight, grad_output, into)

    def embedding_bag_sample_weights_backward(
        self,
        grad_output: Tensor,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        shard: Shard | None = None,
    ) -> Tensor:
        bags, padding_idx = _local_bags(bags, weight.shape[0], padding_idx, shard)
        grad = reference.embedding_bag_sample_weights_backward(
            _array(grad_output), _array(weight), *_bag_arrays(bags), padding_idx
        )
        return torch.from_numpy(grad).to(grad_output)

    def table_batched_embedding(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> Tensor:
        if record is not None:
            write_out_of_range(record, batch, batch.places())
        output = reference.table_batched_embedding(
            _array(weight),
            *_batch_arrays(batch),
            batch.shape.pooled,
            _array(per_sample_weights),
            zero_padding,
            _max_positions_array(batch),
        )
        return torch.from_numpy(output).to(weight.device, batch.shape.output_dtype or weight.dtype)

    def table_batched_embedding_max(
        self,
        weight: Tensor,
        batch: TableBatch,
        with_argmax: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        if record is not None:
            write_out_of_range(record, batch, batch.places())
        output, max_positions = reference.table_batched_embedding_max(
            _array(weight), *_batch_arrays(batch)
        )
        max_positions = max_positions if with_argmax else max_positions[:0, 0]
        return (
            torch.from_numpy(output).to(weight.device, batch.shape.output_dtype or weight.dtype),
            torch.from_numpy(max_positions).to(weight.device, batch.position_dtype),
        )

    def table_batched_embedding_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        weight_shape: tuple[int, ...],
        into: Tensor | None = None,
    ) -> Tensor:
        grad_weight = reference.table_batched_embedding_dense_backward(
            _array(grad_output),
            *_batch_arrays(batch),
            batch.shape.pooled,
            weight_shape,
            _array(per_sample_weights),
            _max_positions_array(batch),
        )
        return _gradient(grad_weight, grad_output, into, batch.shape.table_dtype)

    def table_batched_embedding_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, batch: TableBatch
    ) -> Tensor:
        grad = reference.table_batched_embedding_sample_weights_backward(
            _array(grad_output), _array(weight), *_batch_arrays(batch)
        )
        return torch.from_numpy(grad).to(weight)

    def take_rows(
        self, weight: Tensor, indices: Tensor, dtype: torch.dtype, record: BoundsRecord | None
    ) -> Tensor:
        if record is not None:
            record.write(wrap_negative(indices, weight.shape[0]), -weight.shape[0])
        rows = reference.take_rows(_array(weight), _ids_array(indices))
        return torch.from_numpy(rows).to(weight.device, dtype)

    def dequantize_rows(
        self,
        table: QuantizedTable,
        indices: Tensor,
        dtype: torch.dtype,
        record: BoundsRecord | None,
    ) -> Tensor:
        num_embeddings = table.values.shape[0]
        if table.fused:
            if record is not None:
                record.write(indices, num_embeddings)
            values = table.values.cpu().numpy()
            rows = reference.dequantize_fused_rows(values, _ids_array(indices), *table.layout)
            return torch.from_numpy(rows).to(table.scale.device, dtype)
        if record is not None:
            record.write(wrap_negative(indices, num_embeddings), -num_embeddings)
        rows = reference.dequantize_rows(
            table.values.cpu().numpy(),
            _array(table.scale),
            None if table.zero is None else table.zero.cpu().numpy(),
            _ids_array(indices),
            table.embedding_dim,
            table.group_size,
            table.bits,
        )
        return torch.from_numpy(rows).to(table.scale.device, dtype)

    def table_row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        entries: TableEntries,
        rows: Tensor | None,
    ) -> None:
        """One table after the other: an update is of rows, and knows of no other table."""
        chosen = entries.in_table()
        if rows is not None:
            chosen &= rows[torch.where(chosen, entries.rows, 0)]
        table_fields = (
            TableColumn.FIRST_ROW,
            TableColumn.NUM_ROWS,
            TableColumn.DIM,
            TableColumn.FIRST_ELEMENT,
        )
        values = entries.row_values()
        # Features of one table differ in other fields alone, and are one update.
        for first_row, num_rows, dim, begin in (
            entries.fields[:, table_fields].unique(dim=0).tolist()
        ):
            own = chosen & (entries.rows >= first_row) & (entries.rows < first_row + num_rows)
            if not own.any():
                continue
            of_rows = slice(first_row, first_row + num_rows)
            of_elements = slice(begin, begin + num_rows * dim)
            self.row_update_(
                update,
                weight.view(-1)[of_elements].view(num_rows, dim),
                tuple(
                    tensor[of_rows]
                    if layout.per_row
                    else tensor.view(-1)[of_elements].view(num_rows, dim)
                    for layout, tensor in zip(STATE[update.formula], state, strict=True)
                ),
                entries.rows[own] - first_row,
                values[own, :dim],
                None,
                first_row,
            )


def _local(
    indices: Tensor, num_rows: int, padding_idx: int, shard: Shard | None
) -> tuple[Tensor, int]:
    """Ids and padding as rows of the shard, as `Shard.local` numbers them."""
    if shard is None:
        return indices, padding_idx
    return shard.local(indices, num_rows, padding_idx), num_rows


def _local_bags(
    bags: Bags, num_rows: int, padding_idx: int, shard: Shard | None
) -> tuple[Bags, int]:
    if shard is None:
        return bags, padding_idx
    return shard.local_bags(bags, num_rows, padding_idx), num_rows


def _ids_array(indices: Tensor) -> Any:
    """The ids in a dtype that NumPy has."""
    return (indices.double() if indices.is_floating_point() else indices).cpu().numpy()


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().double().numpy()


def _gradient(
    grad_weight: Any, grad_output: Tensor, into: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """A sum in fp64 rounded to grad_output's dtype, or another, or what it adds to `into` where it is not zero."""
    total = torch.from_numpy(grad_weight)
    if into is None:
        return total.to(grad_output.device, dtype or grad_output.dtype)
    element = total.nonzero(as_tuple=True)
    here = tuple(index.to(into.device) for index in element)
    into[here] = (into[here].double() + total[element].to(into.device)).to(into.dtype)
    return into


def _bag_arrays(bags: Bags) -> tuple[Any, Any]:
    """The ids [N] and the offsets [B + 1]."""
    begin, end = bags.ends()
    return bags.indices.cpu().numpy(), torch.cat([begin, end[-1:]]).cpu().numpy()


def _max_positions_array(batch: TableBatch) -> Any:
    return None if batch.max_positions is None else batch.max_positions.cpu().numpy()


def _batch_arrays(batch: TableBatch) -> tuple[Any, Any, Any]:
    """The ids [N], the offsets [T * B + 1] and the tables' fields."""
    return *_bag_arrays(batch.bags), batch.fields.cpu().numpy()
