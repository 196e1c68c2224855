"""Many tables in one buffer: their rows and bags, gradients and optimizer steps, all at once."""

from abc import abstractmethod

import torch
from torch import Tensor

from ...bounds import BoundsRecord
from ...dtypes import accumulation
from ...row_update import RowUpdate
from ...tables.batch import TableBatch
from ...tables.entries import TableEntries
from .access import cdiv, sort_key_dtype
from .bag import BagPlan
from .carries import Carries, Runs, cut
from .gradient import OutputBags
from .gradient_method import choose
from .row_update import RowUpdatePlan
from .sort import check_sortable

# Programs that keep a large card busy: long bags are split until at least this many programs run.
MIN_BAG_PROGRAMS = 2048
# Mean ids a split, at least.
MIN_SPLIT_LENGTH = 64
MAX_BAG_SPLITS = 512


class TablesPlan(BagPlan, RowUpdatePlan):
    """`Backend`'s `table_batched_embedding*` methods, and `table_row_update_`."""

    def table_batched_embedding(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> Tensor:
        if not batch.shape.pooled:
            rows = weight.new_empty((batch.indices.numel(), batch.shape.widest))
            self._table_gather(weight, batch, rows, zero_padding, record)
            return rows.to(batch.shape.output_dtype or weight.dtype)
        dtype = batch.shape.output_dtype
        output = weight.new_empty((batch.bags_per_table, batch.width), dtype=dtype)
        splits = self._table_splits(weight, batch)
        if splits == 1:
            self._table_bag(
                weight,
                per_sample_weights,
                batch,
                output,
                None,
                batch.max_positions,
                False,
                splits,
                record,
            )
            return output
        acc_dtype = accumulation(weight.dtype)
        partial = output.new_empty((splits, *output.shape), dtype=acc_dtype)
        sizes = torch.empty_like(partial, dtype=torch.int64) if batch.shape.mean else None
        self._table_bag(
            weight,
            per_sample_weights,
            batch,
            partial,
            sizes,
            batch.max_positions,
            False,
            splits,
            record,
        )
        # Divisors differ by table, so combine sees each output element as a bag with D = 1.
        self._table_combine(
            partial.view(splits, -1, 1),
            None if sizes is None else sizes.view(splits, -1),
            output.view(-1, 1),
        )
        return output

    def table_batched_embedding_max(
        self,
        weight: Tensor,
        batch: TableBatch,
        with_argmax: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = batch.shape.output_dtype
        output = weight.new_empty((batch.bags_per_table, batch.width), dtype=dtype)
        shape = output.shape if with_argmax else (0,)
        max_positions = output.new_empty(shape, dtype=batch.position_dtype)
        found = max_positions if with_argmax else None
        self._table_bag(weight, None, batch, output, None, found, True, 1, record)
        return output, max_positions

    def table_batched_embedding_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        weight_shape: tuple[int, ...],
        into: Tensor | None = None,
    ) -> Tensor:
        in_place, grad_weight = into is not None, into
        if grad_weight is None:
            grad_weight = grad_output.new_zeros(weight_shape, dtype=batch.shape.table_dtype)
        if per_sample_weights is not None and per_sample_weights.dtype != grad_output.dtype:
            # The kernels read both in one dtype.
            wide = accumulation(grad_output.dtype)
            grad_output, per_sample_weights = grad_output.to(wide), per_sample_weights.to(wide)
        method = choose(
            batch.indices.numel(),
            batch.shape.num_rows,
            grad_weight.dtype,
            torch.are_deterministic_algorithms_enabled(),
            False,
            self._methods[batch.indices.device].gradient,
            served=("atomic", "sorted"),
        )
        if method == "atomic" and batch.shape.pooled:
            splits = self._table_splits(grad_output, batch)
            self._table_scatter_add(
                grad_output, per_sample_weights, batch, grad_weight, splits, in_place
            )
            return grad_weight
        if method == "atomic":
            keys = self._table_row_keys(batch, torch.int64)
            self._scatter_add(grad_output, keys, None, grad_weight, -1, in_place)
            return grad_weight
        keys, order = self._sorted_row_keys(batch)
        # Not made before the sort has freed its memory.
        bags = self._output_bags(batch, per_sample_weights)
        if not batch.is_uniform or batch.max_positions is not None:
            assert bags is not None
            carries = cut(keys, batch.shape.widest, accumulation(grad_weight.dtype))
            runs = Runs(grad_output, order, keys)
            for join in carries.launches:
                self._table_segment_sum(runs, bags, batch, grad_weight, carries, join, in_place)
            return grad_weight
        if bags is not None:
            # Bag b of table t is row b * T + t.
            grad_output = grad_output.reshape(-1, batch.shape.widest)
        runs = Runs(grad_output, order, keys)
        self._sum_runs(runs, bags, grad_weight, False, in_place=in_place)
        return grad_weight

    def table_batched_embedding_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, batch: TableBatch
    ) -> Tensor:
        keys = self._table_row_keys(batch, torch.int64)
        bags = self._output_bags(batch, None)
        assert bags is not None
        grad = weight.new_empty(batch.indices.shape)
        self._table_sample_weights(grad_output, weight, keys, bags.bag_of, batch, grad)
        return grad

    def _table_row_keys(self, batch: TableBatch, dtype: torch.dtype) -> Tensor:
        """The row of each position among the rows of all tables [N]; `num_rows` for those without a gradient.

        Of dtype int16 they are sort keys, as `sort_key_dtype` has them.
        """
        keys = batch.indices.new_empty(batch.indices.numel(), dtype=dtype)
        self._table_keys(batch, keys, None, None)
        return keys

    def _output_bags(
        self, batch: TableBatch, per_sample_weights: Tensor | None
    ) -> OutputBags | None:
        """The bag of each position, b * T + t for bag b of table t; None without pooling."""
        if not batch.shape.pooled:
            return None
        num_bags = batch.bags.num_bags
        dtype = torch.int32 if num_bags < 2**31 else torch.int64
        output_bag = batch.indices.new_empty(batch.indices.numel(), dtype=dtype)
        sizes = output_bag.new_zeros(num_bags, dtype=torch.int32) if batch.shape.mean else None
        self._table_keys(batch, None, output_bag, sizes)
        return OutputBags(output_bag, per_sample_weights, sizes)

    def _sorted_row_keys(self, batch: TableBatch) -> tuple[Tensor, Tensor]:
        """The rows of all positions in ascending order, and the position that each came from."""
        check_sortable(batch.indices.numel())
        keys = self._table_row_keys(batch, sort_key_dtype(batch.shape.num_rows))
        keys, order = torch.sort(keys, stable=True)
        return keys, order

    def table_row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        entries: TableEntries,
        rows: Tensor | None,
    ) -> None:
        if rows is not None:
            chosen = torch.empty_like(entries.rows)
            self._select_rows(entries.rows, rows.view(torch.uint8), chosen)
            entries = entries._replace(rows=chosen)
        keys, order = self._sorted_keys(entries.rows, entries.num_rows, padding_idx=-1)
        acc_dtype = accumulation(weight.dtype)
        if update.formula == "rowwise_adagrad" and not self._holds_row(entries.widest, acc_dtype):
            total, run_keys = self._sums_of_runs(
                entries.row_values(), order, keys, entries.num_rows
            )
            self._table_rowwise_adagrad(update, total, run_keys, weight, state[0], entries)
            return
        runs = Runs(entries.values, order, keys)
        carries = cut(keys, entries.widest, acc_dtype)
        for join in carries.launches:
            self._table_row_update(update, runs, entries, weight, state, carries, join)

    def _table_splits(self, matrix: Tensor, batch: TableBatch) -> int:
        """Into how many parts each bag is cut, so that few long bags keep the card busy."""
        programs = self._table_programs(matrix, batch)
        return bag_splits(programs, batch.indices.numel(), batch.bags.num_bags)

    @abstractmethod
    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        """How many programs `_table_bag` and `_table_scatter_add` launch for whole bags."""

    @abstractmethod
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
    ) -> None: ...

    @abstractmethod
    def _table_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None: ...

    @abstractmethod
    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None: ...

    @abstractmethod
    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        output_bag: Tensor | None,
        sizes: Tensor | None,
    ) -> None: ...

    @abstractmethod
    def _table_scatter_add(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        grad_weight: Tensor,
        splits: int,
        in_place: bool,
    ) -> None: ...

    @abstractmethod
    def _table_segment_sum(
        self,
        runs: Runs,
        bags: OutputBags,
        batch: TableBatch,
        grad_weight: Tensor,
        carries: Carries,
        join: bool,
        in_place: bool,
    ) -> None: ...

    @abstractmethod
    def _table_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        keys: Tensor,
        output_bag: Tensor,
        batch: TableBatch,
        grad: Tensor,
    ) -> None: ...

    @abstractmethod
    def _table_row_update(
        self,
        update: RowUpdate,
        runs: Runs,
        entries: TableEntries,
        weight: Tensor,
        state: tuple[Tensor, ...],
        carries: Carries,
        join: bool,
    ) -> None: ...

    @abstractmethod
    def _table_rowwise_adagrad(
        self,
        update: RowUpdate,
        total: Tensor,
        keys: Tensor,
        weight: Tensor,
        state: Tensor,
        entries: TableEntries,
    ) -> None: ...


def bag_splits(programs: int, num_indices: int, num_bags: int) -> int:
    """Into how many parts to cut each bag where `programs` of them take whole bags; a power of two."""
    wanted = min(
        cdiv(MIN_BAG_PROGRAMS, max(programs, 1)),
        num_indices // (num_bags * MIN_SPLIT_LENGTH),
        MAX_BAG_SPLITS,
    )
    return 1 << max(wanted.bit_length() - 1, 0)
