"""Where the tables of one buffer lie, and what one batched call looks up in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .bags import Bags
from .bounds import BoundsRecord, table_name_id

# Tables of different widths begin at a multiple of so many elements: 16 bytes in every dtype from 16 bits on.
TABLE_ALIGNMENT = 8
# By their number in `TableField.MODE`.
MODES = ("sum", "mean", "max")


class TableField:
    """The columns of `Tables.fields`: what a kernel knows of a table; as in kernels/table_batched."""

    FIRST_ROW = 0  # its first row's number among the rows of all tables
    NUM_ROWS = 1
    FIRST_ELEMENT = 2  # where it begins in the buffer
    DIM = 3
    FIRST_COLUMN = 4  # where its columns begin in the output
    MODE = 5  # of MODES
    PADDING_IDX = 6  # -1: none
    NAME = 7  # the name's number, `bounds.table_name_id`


class RowRange(NamedTuple):
    """The rows of tables that lie one behind another in the buffer."""

    first_row: int  # among the rows of all tables
    num_rows: int
    first_element: int  # where in the buffer they begin
    shape: tuple[int, ...]  # as a tensor: [rows, D] of one D, else [elements]


@dataclass(frozen=True)
class TableLayout:
    """Tables one behind another in one buffer, as the host knows them."""

    names: tuple[str, ...]
    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    modes: tuple[str, ...]  # of MODES
    padding_idx: tuple[int, ...]  # -1: none

    @property
    def num_tables(self) -> int:
        return len(self.names)

    @property
    def is_uniform(self) -> bool:
        """Whether the buffer is a matrix: all tables have one embedding_dim."""
        return len(set(self.embedding_dims)) == 1

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        return tuple(accumulate(self.num_embeddings, initial=0))[:-1]

    @cached_property
    def first_columns(self) -> tuple[int, ...]:
        return tuple(accumulate(self.embedding_dims, initial=0))[:-1]

    @cached_property
    def first_elements(self) -> tuple[int, ...]:
        return self._starts[:-1]

    @cached_property
    def buffer_shape(self) -> tuple[int, ...]:
        """[rows, D] of tables of one D, else [elements]."""
        if self.is_uniform:
            return sum(self.num_embeddings), self.embedding_dims[0]
        return (self._starts[-1],)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each table begins, and where the buffer ends."""
        alignment = 1 if self.is_uniform else TABLE_ALIGNMENT
        sizes = (
            -(-rows * dim // alignment) * alignment
            for rows, dim in zip(self.num_embeddings, self.embedding_dims, strict=True)
        )
        return tuple(accumulate(sizes, initial=0))

    def view(self, buffer: Tensor, table: int) -> Tensor:
        """The rows of one table, [V, D], in the buffer's memory."""
        rows, dim = self.num_embeddings[table], self.embedding_dims[table]
        if self.is_uniform:
            return buffer.narrow(0, self.first_rows[table], rows)
        return buffer.narrow(0, self.first_elements[table], rows * dim).view(rows, dim)

    def row_range(self, first: int, end: int) -> RowRange:
        """The tables from number `first` up to `end`."""
        num_rows = sum(self.num_embeddings[first:end])
        if self.is_uniform or end - first == 1:
            shape: tuple[int, ...] = (num_rows, self.embedding_dims[first])
        else:
            shape = (self._starts[end] - self._starts[first],)
        return RowRange(self.first_rows[first], num_rows, self._starts[first], shape)

    def shape(self, pooled: bool) -> "TableShape":
        return TableShape(
            sum(self.num_embeddings),
            max(self.embedding_dims),
            gcd(*self.embedding_dims),
            "mean" in self.modes,
            pooled,
        )

    def fields(self, device: torch.device) -> Tensor:
        """int64 [T, 8]: `TableField`'s columns of each table."""
        columns = (
            self.first_rows,
            self.num_embeddings,
            self.first_elements,
            self.embedding_dims,
            self.first_columns,
            tuple(MODES.index(mode) for mode in self.modes),
            self.padding_idx,
            tuple(table_name_id(name) for name in self.names),
        )
        return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device=device)

    def table_of_column(self, device: torch.device) -> Tensor:
        """int32 [sum D]: whose each column of the pooled output is."""
        dims = torch.tensor(self.embedding_dims)
        tables = torch.arange(self.num_tables, dtype=torch.int32)
        return tables.repeat_interleave(dims).to(device)


class Tables(NamedTuple):
    """A layout, and what the kernels read of it."""

    layout: TableLayout
    fields: Tensor  # int64 [T, 8]
    table_of_column: Tensor  # int32 [sum D]


class TableShape(NamedTuple):
    """What the host must know of a batched lookup beside its tensors' shapes."""

    num_rows: int  # of all tables
    widest: int  # the largest D
    dim_divisor: int  # the largest number that divides every D
    mean: bool  # whether any table takes means
    pooled: bool  # one output row a bag; else one an id


class TableBatch(NamedTuple):
    """N ids cut into T * B bags, table-major: bag t * B + b is bag b of table t."""

    indices: Tensor  # [N], adjacent in memory
    offsets: Tensor  # [T * B + 1]; may be wrong: whoever reads them keeps them within [0, N]
    fields: Tensor  # int64 [T, 8]
    table_of_column: Tensor  # int32 [sum D]
    shape: TableShape
    # int32 or int64 [B, sum D]: in columns of tables of mode "max" the position that is the maximum, -1: none; where
    # it is known, what becomes of a table is linear. None: no table has that mode.
    winner: Tensor | None = None

    @property
    def num_tables(self) -> int:
        return self.fields.shape[0]

    @property
    def bags_per_table(self) -> int:
        """B."""
        return (self.offsets.shape[0] - 1) // self.num_tables

    @property
    def width(self) -> int:
        """Columns of the pooled output."""
        return self.table_of_column.shape[0]

    @property
    def position_dtype(self) -> torch.dtype:
        """An integer dtype that holds a position."""
        return torch.int32 if self.indices.shape[0] < 2**31 else torch.int64

    @property
    def is_uniform(self) -> bool:
        return self.width == self.num_tables * self.shape.widest

    def buffer_shape(self, length: int) -> tuple[int, ...]:
        """`TableLayout.buffer_shape`, given the first of it."""
        return (length, self.shape.widest) if self.is_uniform else (length,)

    @property
    def bags(self) -> Bags:
        """The bags of all tables as those of one."""
        return Bags(self.indices, self.offsets, self.num_tables * self.bags_per_table)

    def field(self, number: int, table: Tensor) -> Tensor:
        """One of `TableField` for each of these tables, int64."""
        return self.fields[:, number][table]

    def places(self) -> "Places":
        """Where each position belongs, with torch's operators, differentiating nothing."""
        bags = self.bags
        bag = bags.bag_of()
        in_bag = bag >= 0
        table = bag.clamp(min=0) // max(self.bags_per_table, 1)
        index = self.indices.to(torch.int64)
        in_table = (index >= 0) & (index < self.field(TableField.NUM_ROWS, table))
        # -1 is no padding where it stands for there being none.
        is_padding = (index == self.field(TableField.PADDING_IDX, table)) & (index >= 0)
        row = torch.where(in_bag & in_table, self.field(TableField.FIRST_ROW, table) + index, -1)
        return Places(bag, table, row, in_bag & ~is_padding)

    def sources(self, places: "Places") -> Tensor:
        """Which part of the output each position adds to -> int64 [N]: that of bag b of table t is b * T + t."""
        return (places.bag - places.table * self.bags_per_table) * self.num_tables + places.table

    def bag_sizes(self, places: "Places") -> Tensor:
        """What divides each bag's sum -> int64 [T * B]: ids that count for a mean, at least 1; 1 for a sum."""
        num_bags = self.num_tables * self.bags_per_table
        sizes = places.bag.new_zeros(num_bags + 1)
        counted = torch.where(places.counted, places.bag, num_bags)
        sizes = sizes.index_add_(0, counted, torch.ones_like(counted))[:-1].clamp(min=1)
        table = torch.arange(num_bags, device=sizes.device) // self.bags_per_table
        is_mean = self.field(TableField.MODE, table) == MODES.index("mean")
        return torch.where(is_mean, sizes, 1)


class Places(NamedTuple):
    """What there is to know of each position, [N] each."""

    bag: Tensor  # int64: among the bags of all tables; -1: none
    table: Tensor  # int64: its bag's; 0 where there is none
    row: Tensor  # int64: among the rows of all tables; -1: in no bag, or its id is out of its table's range
    counted: Tensor  # bool: in a bag, and no padding: counts for the mean


def make_layout(
    tables: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]],
    mode: str | Mapping[str, str] | Sequence[str],
    padding_idx: int | Mapping[str, int | None] | Sequence[int | None] | None,
) -> TableLayout:
    """Check a layer's arguments and lay its tables out.

    Args:
        tables: (num_embeddings, embedding_dim) of each, by name, or in a sequence, for the names "0", "1", ...
        mode, padding_idx: of all tables, or by name, or in a sequence. A name left out gets "sum" and None.
    """
    if isinstance(tables, Mapping):
        names, sizes = tuple(tables), tuple(tables.values())
    else:
        names, sizes = tuple(str(number) for number in range(len(tables))), tuple(tables)
    if not names:
        raise ValueError("at least one table is needed")
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            # They are parts of state_dict's keys.
            raise ValueError(
                f"a table's name is a string that is not empty and has no '.', got {name!r}"
            )
    for name, (rows, dim) in zip(names, sizes, strict=True):
        if rows < 0 or dim < 1:
            raise ValueError(
                f"table {name!r}: num_embeddings must be at least 0 and embedding_dim at least 1, "
                f"got {rows} and {dim}"
            )
    modes = _per_table("mode", mode, names, "sum")
    for name, one in zip(names, modes, strict=True):
        if one not in MODES:
            raise ValueError(f"table {name!r}: mode has to be one of sum, mean, max, got {one!r}")
    paddings = _per_table("padding_idx", padding_idx, names, None)
    return TableLayout(
        names,
        tuple(int(rows) for rows, _ in sizes),
        tuple(int(dim) for _, dim in sizes),
        tuple(modes),
        tuple(
            _wrap_padding_idx(name, one, rows)
            for name, one, (rows, _) in zip(names, paddings, sizes, strict=True)
        ),
    )


def _per_table(argument: str, value: object, names: tuple[str, ...], default: object) -> list:
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in names]
        if unknown:
            raise ValueError(f"{argument}: no table is named {unknown[0]!r}")
        return [value.get(name, default) for name in names]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(names):
            raise ValueError(f"{argument}: {len(value)} values for {len(names)} tables")
        return list(value)
    return [value] * len(names)


def _wrap_padding_idx(name: str, padding_idx: int | None, num_embeddings: int) -> int:
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"table {name!r}: padding_idx must be within num_embeddings, {num_embeddings}, got {padding_idx}"
        )
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx


def write_out_of_range(record: BoundsRecord, batch: TableBatch) -> None:
    """Record the first id that is out of its table's range, with torch's operators."""
    places = batch.places()
    begin, _ = batch.bags.ends()
    words = (
        batch.field(TableField.NUM_ROWS, places.table),
        places.bag - places.table * batch.bags_per_table + 1,
        begin[places.bag.clamp(min=0)],
        batch.field(TableField.NAME, places.table),
    )
    out_of_range = (places.bag >= 0) & (places.row < 0)
    record.write_places(batch.indices.to(torch.int64), out_of_range, torch.stack(words))
