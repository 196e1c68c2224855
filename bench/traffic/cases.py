"""The calls that are counted, and the sectors that each has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpu_embed.backends._plan.access import cdiv, sort_key_dtype
from gpu_embed.bags import Bags
from gpu_embed.dtypes import accumulation
from gpu_embed.row_update import STATE
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.layout import TableColumn

from ..codegen.cases import Case
from ..ptx.counts import SECTOR_BYTES

CPU = torch.device("cpu")
# Whole programs for every width; and ids of which no grid, vector or sector is full.
N, UNEVEN = 1024, 1001
# Of the bag of each position.
BAG_NUMBER_BYTES = 4


@dataclass(frozen=True)
class CountedCase(Case):
    """A case on tensors with data: ids are drawn, and bags have nearly equal lengths."""

    num_indices: int = N
    num_embeddings: int = 4096
    hot: float = 0.0  # share of the ids that name row 0
    distinct: bool = False  # no two ids name one row

    def ids(self) -> Tensor:
        generator = torch.Generator(CPU).manual_seed(0)
        shape = (self.num_indices,)
        if self.distinct:
            rows = torch.randperm(self.num_embeddings, generator=generator, device=CPU)
            return rows[: self.num_indices].to(self.index_dtype)
        drawn = torch.randint(self.num_embeddings, shape, generator=generator, device=CPU)
        drawn[torch.rand(shape, generator=generator, device=CPU) < self.hot] = 0
        return drawn.to(self.index_dtype)

    def matrix(self, rows: int) -> Tensor:
        return torch.ones(rows, self.embedding_dim, dtype=self.dtype, device=CPU)

    def existing(self, *shape: int) -> Tensor | None:
        into = super().existing(*shape)
        return None if into is None else torch.ones_like(into, device=CPU)

    def bags(self) -> Bags:
        offsets = None if self.equal_lengths else self._starts(self.num_bags)[:-1]
        return Bags(self.ids(), offsets, self.num_bags)

    def tables(
        self, *, pooled: bool = True, with_argmax: bool = False
    ) -> tuple[Tensor, TableBatch]:
        assert not with_argmax, "no case takes maxima"
        layout = self.layout
        batch = TableBatch(
            self.ids(),
            self._starts(layout.num_tables * self.num_bags),
            layout.fields(CPU),
            layout.table_of_column(CPU),
            layout.shape(pooled),
        )
        return torch.ones(layout.buffer_shape, dtype=self.dtype, device=CPU), batch

    def _starts(self, num_bags: int) -> Tensor:
        """Where each bag begins, and where the last one ends."""
        return torch.arange(num_bags + 1, device=CPU) * self.num_indices // num_bags

    def state(self, formula: str, num_rows: int, weight: Tensor) -> tuple[Tensor, ...]:
        dtype = accumulation(self.dtype)
        return tuple(
            torch.ones(state.shape(weight, num_rows), dtype=dtype, device=CPU)
            for state in STATE[formula]
        )


@dataclass(frozen=True)
class Ideal:
    """Sectors that a kernel has to touch."""

    loads: int = 0
    stores: int = 0
    atomics: int = 0
    # Of the rows, or of the ids where it has none: what goes through it.
    moved_bytes: int = 0


def ideals(case: Case) -> dict[str, Ideal]:
    """Those of a case's kernels, by what their names begin with; any other kernel has nothing to move."""
    return IDEALS[case.operation](case)


def array_sectors(numel: int, itemsize: int) -> int:
    """Of an array from start to end."""
    return cdiv(numel * itemsize, SECTOR_BYTES)


def row_sectors(rows: Tensor, dim: int, itemsize: int) -> int:
    """Of each of these rows, by number, of a matrix with so many columns."""
    return span_sectors(rows.long() * dim * itemsize, dim * itemsize)


def span_sectors(first: Tensor, num_bytes: Tensor | int) -> int:
    """Of so many bytes from each of these on."""
    last = first + num_bytes - 1
    return int((last // SECTOR_BYTES - first // SECTOR_BYTES + 1).sum())


def _own_rows(case: Case) -> Tensor:
    """The row of each id that the table in hand has."""
    rows = case.ids().long() - (case.first_row or 0)
    return rows[(rows >= 0) & (rows < case.num_embeddings)]


def _gather(case: Case) -> dict[str, Ideal]:
    rows, dim = _own_rows(case), case.embedding_dim
    output_itemsize = (case.output_dtype or case.dtype).itemsize
    gather = Ideal(
        loads=_ids_sectors(case) + row_sectors(rows, dim, case.dtype.itemsize),
        stores=array_sectors(case.num_indices * dim, output_itemsize),
        moved_bytes=case.num_indices * dim * case.dtype.itemsize,
    )
    return {"take" if case.operation == "take" else "gather": gather}


def _scatter_add(case: Case) -> dict[str, Ideal]:
    rows, dim, itemsize = _own_rows(case), case.embedding_dim, case.dtype.itemsize
    scatter_add = Ideal(
        loads=_ids_sectors(case) + array_sectors(len(rows) * dim, itemsize),
        atomics=row_sectors(rows, dim, case.gradient_itemsize),
        moved_bytes=len(rows) * dim * itemsize,
    )
    return {"scatter_add": scatter_add}


def _bag_scatter_add(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    bag_of = case.bags().bag_of()
    numbers = array_sectors(len(ids), BAG_NUMBER_BYTES)
    scatter_add = Ideal(
        loads=_ids_sectors(case) + numbers + row_sectors(bag_of, dim, itemsize),
        atomics=row_sectors(ids, dim, case.gradient_itemsize),
        moved_bytes=len(ids) * dim * itemsize,
    )
    offsets = 0 if case.equal_lengths else array_sectors(case.num_bags, 8)
    return {
        "scatter_add": scatter_add,
        "bag_of": Ideal(loads=offsets, stores=numbers, moved_bytes=4 * len(ids)),
    }


def _sorted(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    keys = array_sectors(len(ids), sort_key_dtype(case.num_embeddings).itemsize)
    order = ids.sort(stable=True)[1]
    rows = row_sectors(ids.unique(), dim, case.gradient_itemsize)
    segment_sum = Ideal(
        loads=keys
        + array_sectors(len(ids), 8)
        + row_sectors(order, dim, itemsize)
        + (rows if case.into else 0),
        stores=rows,
        moved_bytes=len(ids) * dim * itemsize,
    )
    sort_keys = Ideal(loads=_ids_sectors(case), stores=keys, moved_bytes=_ids_bytes(case))
    return {"segment_sum": segment_sum, "sort_keys": sort_keys}


def _row_update(case: Case) -> dict[str, Ideal]:
    """As `_sorted`, and the used rows of the table and of the state are loaded and stored.

    Rows that are updated by their mean square may need two kernels: what sums has nothing to store.
    """
    kernels = _sorted(case)
    sums, rows = kernels["segment_sum"], case.ids().unique()
    itemsize = accumulation(case.dtype).itemsize
    state = sum(
        row_sectors(rows, 1 if kept.per_row else case.embedding_dim, itemsize)
        for kept in STATE[case.operation]
    )
    update = Ideal(
        loads=sums.loads + sums.stores + state,
        stores=sums.stores + state,
        moved_bytes=sums.moved_bytes,
    )
    found = {"row_update": update, "sort_keys": kernels["sort_keys"]}
    if case.operation == "rowwise_adagrad":
        changed = sums.stores + state
        found["segment_sum"] = replace(sums, stores=0)
        found["rowwise_adagrad"] = Ideal(changed, changed, 0, sums.moved_bytes)
    return found


def _counts(case: Case) -> dict[str, Ideal]:
    atomics = case.num_indices
    return {"counts": Ideal(_ids_sectors(case), 0, atomics, _ids_bytes(case))}


def _bag_sum(case: Case) -> dict[str, Ideal]:
    rows, dim, itemsize = _own_rows(case), case.embedding_dim, case.dtype.itemsize
    offsets = 0 if case.equal_lengths else array_sectors(case.num_bags, 8)
    bag_sum = Ideal(
        loads=_ids_sectors(case) + offsets + row_sectors(rows, dim, itemsize),
        stores=array_sectors(case.num_bags * dim, itemsize),
        moved_bytes=len(rows) * dim * itemsize,
    )
    return {"bag_sum": bag_sum}


@dataclass(frozen=True)
class TableReferences:
    """What the ids of batched tables refer to, one entry each."""

    first_byte: Tensor  # of the row, in the buffer
    first_grad_byte: Tensor  # of the bag's columns of the table, in the output
    num_bytes: Tensor  # of either
    # In sectors: the arrays that describe the tables, and where each table's ids begin.
    fields: int
    table_begins: int
    batch: TableBatch


def _table_references(case: Case) -> TableReferences:
    _, batch = case.tables()
    bag = batch.places().bag
    table, bag = bag // case.num_bags, bag % case.num_bags
    first_element, dim, first_column = (
        batch.fields[table][:, column]
        for column in (TableColumn.FIRST_ELEMENT, TableColumn.DIM, TableColumn.FIRST_COLUMN)
    )
    itemsize = case.dtype.itemsize
    begins = torch.arange(batch.num_tables + 1, device=CPU) * case.num_bags
    return TableReferences(
        (first_element + batch.indices * dim) * itemsize,
        (bag * batch.width + first_column) * itemsize,
        dim * itemsize,
        array_sectors(batch.fields.numel(), 8),
        row_sectors(begins, 1, batch.offsets.itemsize),
        batch,
    )


def _table_rows(case: Case) -> dict[str, Ideal]:
    refer = _table_references(case)
    moved = int(refer.num_bytes.sum())
    rows = span_sectors(refer.first_byte, refer.num_bytes)
    gather = Ideal(
        loads=_ids_sectors(case) + refer.table_begins + refer.fields + rows,
        stores=array_sectors(moved, 1),
        moved_bytes=moved,
    )
    return {"table_gather": gather}


def _table_bag(case: Case) -> dict[str, Ideal]:
    refer = _table_references(case)
    bags = Ideal(
        loads=_table_arrays(case, refer) + span_sectors(refer.first_byte, refer.num_bytes),
        stores=array_sectors(case.num_bags * refer.batch.width, case.dtype.itemsize),
        moved_bytes=int(refer.num_bytes.sum()),
    )
    return {"table_bag": bags}


def _table_scatter_add(case: Case) -> dict[str, Ideal]:
    refer = _table_references(case)
    grad = array_sectors(case.num_bags * refer.batch.width, case.dtype.itemsize)
    scatter_add = Ideal(
        loads=_table_arrays(case, refer) + grad,
        atomics=span_sectors(refer.first_byte, refer.num_bytes),
        moved_bytes=int(refer.num_bytes.sum()),
    )
    return {"table_scatter_add": scatter_add}


def _table_sorted(case: Case) -> dict[str, Ideal]:
    refer = _table_references(case)
    batch, order = refer.batch, refer.first_byte.sort(stable=True)[1]
    keys = array_sectors(case.num_indices, sort_key_dtype(batch.shape.num_rows).itemsize)
    # One launch makes the keys, one the bags.
    table_keys = Ideal(
        loads=_ids_sectors(case) + refer.table_begins + refer.fields + _offsets_sectors(batch),
        stores=keys + array_sectors(case.num_indices, BAG_NUMBER_BYTES),
        moved_bytes=_ids_bytes(case),
    )
    rows, first = refer.first_byte.unique(return_inverse=True)
    num_bytes = torch.empty_like(rows).index_put_((first,), refer.num_bytes)
    stores = span_sectors(rows, num_bytes)
    sums = Ideal(
        loads=keys
        + array_sectors(case.num_indices, 8)
        + row_sectors(order, 1, BAG_NUMBER_BYTES)
        + span_sectors(refer.first_grad_byte, refer.num_bytes)
        + (0 if batch.is_uniform else refer.fields)
        + (stores if case.into else 0),
        stores=stores,
        moved_bytes=int(refer.num_bytes.sum()),
    )
    name = "segment_sum" if batch.is_uniform else "table_segment_sum"
    return {name: sums, "table_keys": table_keys}


def _table_arrays(case: Case, refer: TableReferences) -> int:
    """Sectors of ids, offsets, and what describes tables and columns."""
    columns = array_sectors(refer.batch.width, refer.batch.table_of_column.itemsize)
    return _ids_sectors(case) + _offsets_sectors(refer.batch) + refer.fields + columns


def _offsets_sectors(batch: TableBatch) -> int:
    return array_sectors(batch.offsets.numel(), batch.offsets.itemsize)


def _ids_bytes(case: Case) -> int:
    return case.num_indices * case.index_dtype.itemsize


def _ids_sectors(case: Case) -> int:
    return cdiv(_ids_bytes(case), SECTOR_BYTES)


IDEALS: dict[str, Callable[[Case], dict[str, Ideal]]] = {
    "embedding": _gather,
    "take": _gather,
    "atomic": _scatter_add,
    "sorted": _sorted,
    "counts": _counts,
    "bag_sum": _bag_sum,
    "bag_atomic": _bag_scatter_add,
    "table_rows": _table_rows,
    "table_bag": _table_bag,
    "table_atomic": _table_scatter_add,
    "table_sorted": _table_sorted,
    **dict.fromkeys(STATE, _row_update),
}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (1, 3, 4, 5, 8, 16, 32, 33, 50, 64, 96, 100, 128, 256, 300, 768, 1024)
HALF_WIDTHS = (33, 50, 64, 300, 768)


def _case(operation: str, dim: int = 64, dtype: torch.dtype = FP32, **fields: Any) -> CountedCase:
    return CountedCase(operation, dim, dtype, **fields)


def _tables(
    operation: str, dims: tuple[int, ...], dtype: torch.dtype = FP32, **fields: Any
) -> CountedCase:
    return CountedCase(operation, max(dims), dtype, dims=dims, **fields)


CASES = (
    *(_case("embedding", dim) for dim in WIDTHS),
    *(_case("embedding", dim, dtype) for dtype in (BF16, FP16) for dim in HALF_WIDTHS),
    *(_case("embedding", dim, num_indices=UNEVEN) for dim in (50, 64)),
    *(_case("atomic", dim) for dim in WIDTHS),
    *(_case("atomic", dim, num_indices=UNEVEN) for dim in (50, 64)),
    # Few ids and many, the same width.
    *(
        _case("sorted", 128, dtype, num_indices=n)
        for dtype in (FP32, BF16)
        for n in (512, N, 4 * N)
    ),
    *(_case("sorted", dim) for dim in (1, 5, 8, 33, 50, 64, 300, 768)),
    *(_case("sorted", dim, BF16) for dim in HALF_WIDTHS),
    # Added to a gradient that exists.
    *(_case("atomic", dim, into=FP32) for dim in (50, 128)),
    _case("atomic", 128, BF16, into=FP32),
    *(
        _case("sorted", dim, dtype, into=into, distinct=distinct)
        for dim in (50, 128, 768)
        for dtype, into in ((FP32, FP32), (BF16, FP32), (BF16, BF16))
        for distinct in (True, False)
    ),
    *(_case(operation, num_indices=UNEVEN) for operation in ("sorted", "counts", "bag_atomic")),
    *(_case(operation) for operation in ("counts", "bag_atomic")),
    # Bags that are never cut, by their mean length; that may be, but none is; long ones, cut many times; equal lengths.
    *(
        _case("bag_sum", dim, num_indices=4 * N, num_bags=128)
        for dim in (1, 8, 33, 50, 64, 128, 300)
    ),
    *(_case("bag_sum", dim, BF16, num_indices=4 * N, num_bags=128) for dim in (50, 64)),
    *(_case("bag_sum", dim, num_indices=4 * N, num_bags=120) for dim in (1, 50, 64, 300)),
    *(_case("bag_sum", dim, num_indices=4 * N, num_bags=3) for dim in (50, 64)),
    *(_case("bag_sum", dim, num_bags=32, equal_lengths=True) for dim in (50, 64)),
    _case("bag_sum", num_indices=UNEVEN, num_bags=31),
    *(_case("take", dim) for dim in (5, 33, 50, 64, 300)),
    *(_case("take", dim, BF16) for dim in (50, 64)),
    *(_case("take", dim, output_dtype=BF16) for dim in (50, 64)),
    *(_case(formula, 64) for formula in STATE),
    *(_case("sgd", dim, BF16) for dim in (50, 64, 300)),
    # Shards that half of the ids name: the rows of the others move nothing.
    *(_case(operation, first_row=2048) for operation in ("embedding", "atomic", "bag_sum")),
    # Half of all ids name one row.
    *(_case(operation, hot=0.5) for operation in ("atomic", "counts", "bag_atomic")),
    # Tables of one width and of several, each with 32 bags, and one whose ids fill no grid.
    *(_tables("table_rows", (dim,) * 4) for dim in (5, 33, 50, 64, 300)),
    *(_tables("table_rows", (dim,) * 4, BF16) for dim in (50, 64)),
    *(
        _tables(operation, dims)
        for operation in ("table_bag", "table_atomic", "table_sorted")
        for dims in ((64, 64, 64, 64), (128, 64, 32), (50, 33), (33, 5))
    ),
    *(
        _tables(operation, dims, BF16)
        for operation in ("table_bag", "table_sorted")
        for dims in ((64, 32), (50, 30))
    ),
    *(
        _tables(operation, (64, 32), num_indices=UNEVEN)
        for operation in ("table_bag", "table_atomic", "table_sorted")
    ),
    *(
        _tables(operation, dims, into=FP32)
        for operation in ("table_atomic", "table_sorted")
        for dims in ((64, 64, 64, 64), (128, 64, 32))
    ),
    _tables("table_rows", (64, 64), num_indices=UNEVEN),
    _tables("table_atomic", (64, 64), hot=0.5),
)
