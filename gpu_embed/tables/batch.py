"""What one batched call looks up: the ids of many tables, cut into bags."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..bags import Bags
from ..bounds import BoundsRecord
from ..exporting import is_exporting
from .layout import MODES, TableColumn, TableShape


@dataclasses.dataclass(slots=True)
class TableBatch:
    """N ids cut into T * B bags, table-major: bag t * B + b is bag b of table t.

    Where several features look up in one table, each counts as a table here: T is the number of features. What
    follows from the arguments is computed once; `dataclasses.replace` makes a batch with others.
    """

    indices: Tensor  # [N], adjacent in memory
    offsets: Tensor  # [T * B + 1]; may be wrong: whoever reads them keeps them within [0, N]
    fields: Tensor  # int64 [T, 8]
    table_of_column: Tensor  # int32 [sum D]
    shape: TableShape
    # int32 or int64 [B, sum D]: the argmax of max-pooled columns, a position, -1: none. With it fixed, the lookup is
    # linear in the tables. None: no table has mode "max".
    max_positions: Tensor | None = None
    # int64 [T, 8]: as fields, but frozen tables have no rows. None: no table is frozen.
    trained_fields: Tensor | None = None

    num_tables: int = dataclasses.field(init=False)  # T
    bags_per_table: int = dataclasses.field(init=False)  # B
    width: int = dataclasses.field(init=False)  # columns of the pooled output
    is_uniform: bool = dataclasses.field(init=False)  # whether the buffer is a matrix
    bags: Bags = dataclasses.field(init=False)  # of all tables, as those of one

    def __post_init__(self) -> None:
        self.num_tables = tables = self.fields.shape[0]
        self.bags_per_table = bags = (self.offsets.shape[0] - 1) // tables
        self.width = self.table_of_column.shape[0]
        self.is_uniform = self.width == tables * self.shape.widest
        self.bags = Bags(self.indices, self.offsets, tables * bags)

    @property
    def position_dtype(self) -> torch.dtype:
        """An integer dtype that holds a position."""
        return torch.int32 if self.indices.shape[0] < 2**31 else torch.int64

    def buffer_shape(self, length: int) -> tuple[int, ...]:
        """`TableLayout.buffer_shape`, given the first of it."""
        return (length, self.shape.widest) if self.is_uniform else (length,)

    def first_row(self) -> Tensor:
        """The first row of the tables that have rows, int64 []."""
        first_row = self.fields[:, TableColumn.FIRST_ROW]
        has_rows = self.fields[:, TableColumn.NUM_ROWS] > 0
        return torch.where(has_rows, first_row, self.shape.num_rows - 1).amin()

    def places(self) -> "Places":
        """Where each position belongs, with torch's operators, differentiating nothing."""
        bag = self.bags.bag_of()
        in_bag = bag >= 0
        bags_per_table: int | Tensor = max(self.bags_per_table, 1)
        if is_compiling() and is_exporting():
            # As a tensor: an exporter takes it for granted that a number that varies is not 0.
            bags_per_table = bag.new_full((), self.bags_per_table).clamp(min=1)
        table = bag.clamp(min=0) // bags_per_table
        index = self.indices.to(torch.int64)
        in_table = (index >= 0) & (index < self.fields[:, TableColumn.NUM_ROWS][table])
        # padding_idx -1 is a sentinel, and no id.
        is_padding = (index == self.fields[:, TableColumn.PADDING_IDX][table]) & (index >= 0)
        first_row = self.fields[:, TableColumn.FIRST_ROW][table]
        row = torch.where(in_bag & in_table, first_row + index, -1)
        return Places(bag, table, row, in_bag & ~is_padding)

    def output_bag(self, places: "Places") -> Tensor:
        """The output bag of each position, b * T + t for bag b of table t -> int64 [N]."""
        return (places.bag - places.table * self.bags_per_table) * self.num_tables + places.table

    def bag_sizes(self, places: "Places") -> Tensor:
        """What divides each bag's sum -> int64 [T * B]: ids that count for a mean, at least 1; 1 for a sum."""
        num_bags = self.bags.num_bags
        sizes = places.bag.new_zeros(num_bags + 1)
        counted = torch.where(places.counted, places.bag, num_bags)
        sizes = sizes.index_add_(0, counted, torch.ones_like(counted))[:-1].clamp(min=1)
        table = torch.arange(num_bags, device=sizes.device) // self.bags_per_table
        is_mean = self.fields[:, TableColumn.MODE][table] == MODES.index("mean")
        return torch.where(is_mean, sizes, 1)


class Places(NamedTuple):
    """What there is to know of each position, [N] each."""

    bag: Tensor  # int64: among the bags of all tables; -1: none
    table: Tensor  # int64: its bag's; 0 where there is none
    row: Tensor  # int64: among the rows of all tables; -1: in no bag, or its id is out of its table's range
    counted: Tensor  # bool: in a bag, and no padding: counts for the mean


def write_out_of_range(record: BoundsRecord, batch: TableBatch, places: Places) -> None:
    """Record the first id that is out of its table's range, with torch's operators."""
    begin, _ = batch.bags.ends()
    words = (
        batch.fields[:, TableColumn.NUM_ROWS][places.table],
        places.bag - places.table * batch.bags_per_table + 1,
        begin[places.bag.clamp(min=0)],
        batch.fields[:, TableColumn.NAME][places.table],
    )
    out_of_range = (places.bag >= 0) & (places.row < 0)
    record.write_places(batch.indices.to(torch.int64), out_of_range, torch.stack(words))
