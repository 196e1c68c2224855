"""Launches of the kernels of many tables at once."""

from torch import Tensor

from ...bounds import BoundsRecord
from ...tables import TableBatch
from ..kernel_backend import NO_SOURCES, BagSources, cdiv
from ..layout import table_vector_width
from .device import TritonDevice
from .launch import (
    BAG_SAMPLE_WEIGHTS_VECTORS,
    TABLE_BAGS,
    TABLE_GATHER,
    TABLE_KEYS,
    next_power_of_2,
    segment_launch,
)


class TritonTables(TritonDevice):
    """Tables in one buffer."""

    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        num_elements = batch.bags_per_table * batch.width
        return cdiv(num_elements // table_vector_width(matrix, batch), TABLE_BAGS.BLOCK)

    def _table_bag_sum(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        output: Tensor,
        sizes: Tensor | None,
        splits: int,
        record: BoundsRecord | None,
    ) -> None:
        self._launch(
            self._kernels.table_bag_sum,
            (self._table_programs(weight, batch), splits),
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.fields,
            batch.table_of_column,
            output,
            sizes,
            None if record is None else record.words,
            None if record is None else record.flag,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            D=batch.width,
            VEC=table_vector_width(weight, batch),
            MEAN=batch.shape.mean,
            SPLIT=splits > 1,
            **TABLE_BAGS.settings,
        )

    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None:
        vec = table_vector_width(weight, batch)
        self._launch(
            self._kernels.table_gather,
            (cdiv(output.numel() // vec, TABLE_GATHER.BLOCK),),
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            batch.fields,
            output,
            None if record is None else record.words,
            None if record is None else record.flag,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            batch.num_tables.bit_length(),
            batch.bags.num_bags.bit_length(),
            D=batch.shape.widest,
            VEC=vec,
            ZERO_PADDING=zero_padding,
            **TABLE_GATHER.settings,
        )

    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        sources: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        num_ranges = batch.num_tables if sources is None else batch.bags.num_bags
        self._launch(
            self._kernels.table_keys,
            (cdiv(batch.indices.numel(), TABLE_KEYS.BLOCK),),
            batch.indices.device,
            batch.indices,
            batch.offsets,
            batch.fields,
            keys,
            sources,
            sizes,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            batch.shape.num_rows,
            num_ranges.bit_length(),
            **TABLE_KEYS.settings,
        )

    def _table_scatter_add(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        grad_weight: Tensor,
        splits: int,
    ) -> None:
        vec = table_vector_width(grad_output, batch)
        self._launch(
            self._kernels.table_scatter_add,
            (self._table_programs(grad_output, batch), splits),
            grad_output.device,
            grad_output,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.fields,
            batch.table_of_column,
            grad_weight,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=batch.width,
            VEC=vec,
            MEAN=batch.shape.mean,
            SPLIT=splits > 1,
            **TABLE_BAGS.settings,
        )

    def _table_segment_sum(
        self,
        values: Tensor,
        keys: Tensor,
        order: Tensor | None,
        key_tables: Tensor | None,
        sources: BagSources | None,
        batch: TableBatch,
        grad_weight: Tensor,
        partial_values: Tensor,
        partial_keys: Tensor,
        partial_tables: Tensor,
        chunk: int,
    ) -> None:
        widest = batch.shape.widest
        vec = table_vector_width(values, batch)
        launch = segment_launch(widest, vec)
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            self._kernels.table_segment_sum,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(widest, launch.BLOCK_D)),
            keys.device,
            values,
            order,
            keys,
            key_tables,
            *(sources or NO_SOURCES),
            batch.fields,
            grad_weight,
            partial_values,
            partial_keys,
            partial_tables,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            values.stride(0) // vec,
            values.stride(1),
            D=widest,
            VEC=vec,
            CHUNK=chunk,
            **launch.settings,
        )

    def _table_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        keys: Tensor,
        sources: Tensor,
        batch: TableBatch,
        grad: Tensor,
    ) -> None:
        widest = batch.shape.widest
        vec = min(table_vector_width(grad_output, batch), table_vector_width(weight, batch))
        block_d = min(next_power_of_2(widest), 32 * vec)
        block_n = BAG_SAMPLE_WEIGHTS_VECTORS * vec // block_d
        self._launch(
            self._kernels.table_sample_weights,
            (cdiv(keys.numel(), block_n),),
            keys.device,
            grad_output,
            weight,
            keys,
            sources,
            batch.fields,
            grad,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=widest,
            VEC=vec,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
