"""Launches of the kernels of many tables at once."""

from torch import Tensor

from ...bounds import BoundsRecord, record_arguments
from ...dtypes import accumulation
from ...row_update import RowUpdate
from ...tables.batch import TableBatch
from ...tables.entries import TableEntries
from .._plan.access import VECTOR_BYTES, cdiv, table_vector_width
from .._plan.carries import Carries, Runs
from .._plan.gradient import OutputBags
from .._plan.row_update import rowwise_numbers, update_numbers
from .._plan.tables import TablesPlan
from .device import TritonDevice
from .launch import (
    BAG_SAMPLE_WEIGHTS_VECTORS,
    MAX_POSITION_VECTOR,
    ROWWISE_BLOCK,
    SPLIT_VECTORS,
    TABLE_COMBINE,
    carry_vector,
    chunk_launch,
    next_power_of_2,
    segment_launch,
    update_launch,
)


class TritonTables(TritonDevice, TablesPlan):
    """Tables in one buffer."""

    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        num_elements = batch.bags_per_table * batch.width
        vec = table_vector_width(matrix, batch.shape.dim_divisor)
        return cdiv(num_elements // vec, SPLIT_VECTORS)

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
        vec = table_vector_width(weight, batch.shape.dim_divisor)
        launch = self._launches[weight.device].table_bag
        self._launch(
            self._kernels.table_bag,
            (cdiv(batch.bags_per_table * batch.width // vec, launch.BLOCK), splits),
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
            D=batch.width,
            VEC=vec,
            MEAN=batch.shape.mean,
            MAX=find_max,
            SPLIT=splits > 1,
            **launch.settings,
        )

    def _table_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None:
        num_bags, embedding_dim = output.shape
        self._launch(
            self._kernels.table_combine,
            (cdiv(output.numel(), TABLE_COMBINE.BLOCK),),
            output.device,
            partial,
            sizes,
            output,
            len(partial),
            num_bags,
            D=embedding_dim,
            **TABLE_COMBINE.settings,
        )

    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None:
        vec = table_vector_width(weight, batch.shape.dim_divisor)
        launch = chunk_launch(self._launches[weight.device].table_gather, batch.shape.widest // vec)
        self._launch(
            self._kernels.table_gather,
            (cdiv(output.numel() // vec, launch.BLOCK),),
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
            batch.num_tables.bit_length(),
            batch.bags.num_bags.bit_length(),
            D=batch.shape.widest,
            VEC=vec,
            ZERO_PADDING=zero_padding,
            **launch.settings,
        )

    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        output_bag: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        launch = self._launches[batch.indices.device].table_keys
        num_ranges = batch.num_tables if output_bag is None else batch.bags.num_bags
        self._launch(
            self._kernels.table_keys,
            (cdiv(batch.indices.numel(), launch.BLOCK),),
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
            num_ranges.bit_length(),
            **launch.settings,
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
        vec = table_vector_width(grad_output, batch.shape.dim_divisor)
        if in_place:
            vec = min(vec, table_vector_width(grad_weight, batch.shape.dim_divisor))
        launch = self._launches[grad_output.device].table_scatter_add
        self._launch(
            self._kernels.table_scatter_add,
            (cdiv(batch.bags_per_table * batch.width // vec, launch.BLOCK), splits),
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
            D=batch.width,
            VEC=vec,
            MEAN=batch.shape.mean,
            SPLIT=splits > 1,
            **launch.settings,
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
        values, _, keys = runs
        widest = batch.shape.widest
        vec = table_vector_width(values, batch.shape.dim_divisor)
        if in_place:
            # A row is to be read in one access too.
            vec = min(vec, table_vector_width(grad_weight, batch.shape.dim_divisor))
        if batch.max_positions is not None:
            vec = min(vec, MAX_POSITION_VECTOR)
        acc_bytes = accumulation(grad_weight.dtype).itemsize
        walk = self._launches[keys.device].table_segment_sum
        launch = segment_launch(walk, widest, carry_vector(vec, acc_bytes) if join else vec)
        self._launch(
            self._kernels.table_segment_sum,
            (cdiv(carries.num_chunks, launch.BLOCK_C), cdiv(widest, launch.BLOCK_D)),
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
            D=widest,
            VEC=vec,
            JOIN=join,
            IN_PLACE=in_place,
            **launch.settings,
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
        widest = batch.shape.widest
        vec = min(
            table_vector_width(grad_output, batch.shape.dim_divisor),
            table_vector_width(weight, batch.shape.dim_divisor),
        )
        block_d = min(next_power_of_2(widest), 32 * vec)
        block_n = BAG_SAMPLE_WEIGHTS_VECTORS * vec // block_d
        self._launch(
            self._kernels.table_sample_weights,
            (cdiv(keys.numel(), block_n),),
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
            D=widest,
            VEC=vec,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
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
        values, _, keys = runs
        acc_bytes = accumulation(weight.dtype).itemsize
        widths = (table_vector_width(tensor, entries.dim_divisor) for tensor in (values, weight))
        # State, of the accumulation dtype, is to be read in one access too.
        vec = min(*widths, VECTOR_BYTES // acc_bytes)
        held_bytes = acc_bytes if update.formula == "rowwise_adagrad" else 0
        walk = self._launches[keys.device].table_row_update
        lane = carry_vector(vec, acc_bytes) if join else vec
        launch = update_launch(walk, entries.widest, lane, held_bytes)
        self._launch(
            self._kernels.table_row_update,
            (cdiv(carries.num_chunks, launch.BLOCK_C), cdiv(entries.widest, launch.BLOCK_D)),
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
            D=entries.widest,
            VEC=vec,
            FORMULA=update.formula,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            DECAYS_WEIGHT=update.weight_decay != 0,
            JOIN=join,
            **launch.settings,
            **self._unfused,
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
        self._launch(
            self._kernels.table_rowwise_adagrad,
            (keys.numel(),),
            keys.device,
            total,
            keys,
            entries.fields_by_row(),
            weight,
            state,
            update.lr,
            entries.num_rows,
            entries.num_tables,
            entries.num_tables.bit_length(),
            *rowwise_numbers(update),
            D=entries.widest,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            DECAYS_WEIGHT=update.weight_decay != 0,
            BLOCK_D=min(next_power_of_2(entries.widest), ROWWISE_BLOCK),
            **self._unfused,
        )
