"""Launches of the kernels of many tables at once."""

import torch
from torch import Tensor

from ...bounds import BoundsRecord, record_arguments
from ...row_update import RowUpdate
from ...tables.batch import TableBatch
from ...tables.entries import TableEntries
from .._plan.access import cdiv, table_vector_width
from .._plan.carries import Carries, Runs
from .._plan.gradient import OutputBags
from .._plan.row_update import rowwise_numbers, update_numbers
from .._plan.tables import TablesPlan
from .device import FLOATS, CupyDevice, cpp_bool, itemsize
from .gradient import VECTOR_ATOMICS_CAPABILITY, bag_bytes
from .launch import (
    MAX_SEGMENT_VECTOR,
    ROWWISE_ADAGRAD,
    TABLE_COMBINE,
    TABLE_SAMPLE_WEIGHTS,
)
from .nvrtc import Kernel
from .row_update import FORMULAS


class CupyTables(CupyDevice, TablesPlan):
    """Tables in one buffer."""

    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        num_vectors = batch.bags_per_table * (
            batch.width // table_vector(matrix, batch.shape.dim_divisor)
        )
        return cdiv(num_vectors, 32)

    def _table_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        output: Tensor,
        sizes: Tensor | None,
        max_positions: Tensor | None,
        find_max: bool,
        splits: int,
        record: BoundsRecord | None,
    ) -> None:
        vec = table_vector(weight, batch.shape.dim_divisor)
        launch = self._launches[weight.device].table_bag
        arguments = (
            f"{FLOATS[weight.dtype]}, {FLOATS[output.dtype]}, {vec}, "
            f"{cpp_bool(find_max)}, {cpp_bool(splits > 1)}, {launch.UNROLL}"
        )
        (blocks, _), threads = launch.grid(batch.bags_per_table * (batch.width // vec))
        self._launch(
            Kernel("tables", f"table_bag_kernel<{arguments}>"),
            (blocks, splits),
            threads,
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.fields,
            batch.table_of_column,
            output,
            sizes,
            max_positions,
            *record_arguments(record),
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.width,
            batch.indices.element_size(),
            batch.offsets.element_size(),
            itemsize(max_positions),
        )

    def _table_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None:
        num_bags, embedding_dim = output.shape
        self._launch(
            Kernel("tables", f"table_combine_kernel<{FLOATS[output.dtype]}>"),
            *TABLE_COMBINE.grid(output.numel()),
            output.device,
            partial,
            sizes,
            output,
            len(partial),
            num_bags,
            embedding_dim,
        )

    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None:
        word_bytes = table_vector_width(weight, batch.shape.dim_divisor) * weight.element_size()
        row_words = weight.shape[1] * weight.element_size() // word_bytes
        self._launch(
            Kernel("tables", f"table_gather_kernel<word{word_bytes}>"),
            *self._launches[weight.device].table_gather.grid(batch.indices.numel() * row_words),
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            batch.fields,
            output,
            *record_arguments(record),
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            int(zero_padding),
            row_words,
            batch.indices.element_size(),
            batch.offsets.element_size(),
        )

    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        output_bag: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        self._launch(
            Kernel("tables", "table_keys_kernel"),
            *self._launches[batch.indices.device].table_keys.grid(batch.indices.numel()),
            batch.indices.device,
            batch.indices,
            batch.offsets,
            batch.fields,
            keys,
            output_bag,
            sizes,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            batch.shape.num_rows,
            batch.indices.element_size(),
            batch.offsets.element_size(),
            itemsize(keys),
            itemsize(output_bag),
        )

    def _table_scatter_add(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        grad_weight: Tensor,
        splits: int,
        in_place: bool,
    ) -> None:
        launch = self._launches[grad_output.device].table_scatter_add
        vec = 1
        if (
            grad_weight.dtype == torch.float32
            and self._capability(grad_output.device) >= VECTOR_ATOMICS_CAPABILITY
        ):
            vec = table_vector_width(grad_output, batch.shape.dim_divisor)
            if in_place or grad_output.dtype != grad_weight.dtype:
                vec = min(vec, table_vector_width(grad_weight, batch.shape.dim_divisor))
        arguments = (
            f"{FLOATS[grad_output.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, {launch.UNROLL}"
        )
        (blocks, _), threads = launch.grid(batch.bags_per_table * (batch.width // vec))
        self._launch(
            Kernel("tables", f"table_scatter_add_kernel<{arguments}>"),
            (blocks, splits),
            threads,
            grad_output.device,
            grad_output,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.max_positions,
            batch.fields,
            batch.table_of_column,
            grad_weight,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            batch.width,
            batch.indices.element_size(),
            batch.offsets.element_size(),
            itemsize(batch.max_positions),
        )

    def _table_segment_sum(
        self,
        runs: Runs,
        bags: OutputBags,
        batch: TableBatch,
        grad_weight: Tensor,
        carries: Carries,
        join: bool,
        in_place: bool,
    ) -> None:
        values, order, keys = runs
        widest = batch.shape.widest
        vec = table_vector(values, batch.shape.dim_divisor)
        if in_place:
            # A row is read and written in one access too.
            vec = min(vec, table_vector(grad_weight, batch.shape.dim_divisor))
        launch = self._launches[keys.device].table_segment_sum
        arguments = (
            f"{FLOATS[values.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, {launch.UNROLL}, "
            f"{cpp_bool(in_place)}"
        )
        self._launch(
            Kernel("tables", f"table_segment_sum_kernel<{arguments}>"),
            *launch.grid(carries.num_chunks * (widest // vec)),
            keys.device,
            *runs,
            *bags,
            batch.max_positions,
            batch.fields,
            grad_weight,
            carries.partial,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            carries.chunk_size,
            values.stride(0) // vec,
            values.stride(1),
            batch.width,
            widest,
            int(join),
            order.element_size(),
            keys.element_size(),
            bag_bytes(bags),
            itemsize(batch.max_positions),
        )

    def _table_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        keys: Tensor,
        output_bag: Tensor,
        batch: TableBatch,
        grad: Tensor,
    ) -> None:
        vec = min(
            table_vector(grad_output, batch.shape.dim_divisor),
            table_vector(weight, batch.shape.dim_divisor),
        )
        arguments = f"{FLOATS[grad_output.dtype]}, {FLOATS[weight.dtype]}, {vec}"
        self._launch(
            Kernel("tables", f"table_sample_weights_kernel<{arguments}>"),
            *TABLE_SAMPLE_WEIGHTS.grid(keys.numel()),
            keys.device,
            grad_output,
            weight,
            keys,
            output_bag,
            batch.fields,
            grad,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            keys.element_size(),
            output_bag.element_size(),
        )

    def _table_row_update(
        self,
        update: RowUpdate,
        runs: Runs,
        entries: TableEntries,
        weight: Tensor,
        state: tuple[Tensor, ...],
        carries: Carries,
        join: bool,
    ) -> None:
        values, order, keys = runs
        launch = self._launches[keys.device].table_row_update
        widths = (table_vector(tensor, entries.dim_divisor) for tensor in (values, weight, *state))
        vec = min(widths)
        arguments = f"{FLOATS[values.dtype]}, {FLOATS[weight.dtype]}, {vec}, {launch.UNROLL}"
        self._launch(
            Kernel("tables_row_update", f"table_row_update_kernel<{arguments}>"),
            *launch.grid(carries.num_chunks * (entries.widest // vec)),
            keys.device,
            *runs,
            entries.output_bag,
            entries.scales,
            entries.max_positions,
            entries.fields,
            weight,
            *(*state, None, None)[:2],
            carries.partial,
            update.lr,
            keys.numel(),
            entries.num_rows,
            entries.num_tables,
            carries.chunk_size,
            values.stride(0) // vec,
            values.stride(1),
            entries.values.shape[1],
            *update_numbers(update),
            entries.widest,
            FORMULAS.index(update.formula),
            int(update.rounds_at_random(weight.dtype)),
            int(join),
            order.element_size(),
            keys.element_size(),
            entries.output_bag.element_size(),
            itemsize(entries.max_positions),
        )

    def _table_rowwise_adagrad(
        self,
        update: RowUpdate,
        total: Tensor,
        keys: Tensor,
        weight: Tensor,
        state: Tensor,
        entries: TableEntries,
    ) -> None:
        vec = min(table_vector(tensor, entries.dim_divisor) for tensor in (total, weight))
        kernel = f"table_rowwise_adagrad_kernel<{FLOATS[weight.dtype]}, {vec}>"
        self._launch(
            Kernel("tables_row_update", kernel),
            *ROWWISE_ADAGRAD.grid(keys.numel()),
            keys.device,
            total,
            keys,
            entries.fields_by_row(),
            weight,
            state,
            update.lr,
            entries.num_rows,
            entries.num_tables,
            *rowwise_numbers(update),
            entries.widest,
            int(update.rounds_at_random(weight.dtype)),
            keys.numel(),
        )


def table_vector(values: Tensor, dim_divisor: int) -> int:
    return min(table_vector_width(values, dim_divisor), MAX_SEGMENT_VECTOR)
