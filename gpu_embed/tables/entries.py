"""The entries of a sparse gradient: one an id, and their sums over equal rows, whatever the table's height."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulation
from .layout import MODES, RowRange, TableColumn


class TableEntries(NamedTuple):
    """One entry an id, in the order of the ids.

    Entry n's gradient is scales[n] * values[bag, columns of its table]; nothing is copied.
    """

    rows: Tensor  # int64 [N], among the rows of all tables; others take no part
    output_bag: (
        Tensor  # int32 or int64 [N]: the columns of table t in row b of values are b * T + t
    )
    scales: Tensor | None  # [N], in the dtype of the arithmetic: multiplies them; None: 1
    # int32 or int64 [B, sum D]: the argmax of max-pooled columns, an entry; None: no table has mode "max".
    max_positions: Tensor | None
    values: Tensor  # [B, sum D], any strides
    fields: Tensor  # int64 [T, 8], as of `TableBatch`
    num_rows: int  # of all tables
    widest: int  # the largest D
    dim_divisor: int  # the largest number that divides every D

    @property
    def num_tables(self) -> int:
        return self.fields.shape[0]

    def field(self, column: TableColumn) -> Tensor:
        """One of `TableColumn` for each entry's table, int64 [N]."""
        return self.fields[:, column][self.output_bag.to(torch.int64) % len(self.fields)]

    def fields_by_row(self) -> Tensor:
        """`fields` with ascending first rows, to search for a row's table."""
        first_row, num_rows = (
            self.fields[:, column] for column in (TableColumn.FIRST_ROW, TableColumn.NUM_ROWS)
        )
        # A table without rows begins where the next one does, and must come before it.
        return self.fields[(2 * first_row + (num_rows > 0)).argsort(stable=True)]

    def in_table(self) -> Tensor:
        """Which entries take part -> bool [N]."""
        return (self.rows >= 0) & (self.rows < self.num_rows)

    def in_row(self) -> Tensor:
        """Which columns each entry has -> bool [N, widest]."""
        columns = torch.arange(self.widest, device=self.rows.device)
        return self.in_table()[:, None] & (columns < self.field(TableColumn.DIM)[:, None])

    def elements(self, otherwise: int) -> Tensor:
        """Where in the buffer the columns of each entry's row lie -> int64 [N, widest]; `otherwise` where nowhere."""
        row = self.rows - self.field(TableColumn.FIRST_ROW)
        begin = self.field(TableColumn.FIRST_ELEMENT) + row * self.field(TableColumn.DIM)
        columns = torch.arange(self.widest, device=begin.device)
        return torch.where(self.in_row(), begin[:, None] + columns, otherwise)

    def row_values(self) -> Tensor:
        """The values themselves, in the dtype of the arithmetic -> [N, widest], zero behind each D."""
        dtype = accumulation(self.values.dtype)
        in_row = self.in_row()
        if self.values.numel() == 0:
            return self.values.new_zeros(in_row.shape, dtype=dtype)
        bag = (self.output_bag.to(torch.int64) // self.num_tables)[:, None]
        columns = torch.arange(self.widest, device=bag.device)
        column = torch.where(in_row, self.field(TableColumn.FIRST_COLUMN)[:, None] + columns, 0)
        used = in_row
        if self.max_positions is not None:
            place = torch.arange(len(self.rows), device=bag.device)[:, None]
            is_max = self.field(TableColumn.MODE)[:, None] == MODES.index("max")
            used = used & (~is_max | (self.max_positions[bag, column] == place))
        values = self.values[bag, column].to(dtype)
        if self.scales is not None:
            values = values * self.scales[:, None]
        return torch.where(used, values, 0)

    def within(self, part: RowRange) -> "TableEntries":
        """The same with rows and elements counted from a part's first on; rows outside of it take no part."""
        if part.first_element == 0:
            return self._replace(num_rows=part.num_rows)
        shift = torch.zeros_like(self.fields[0])
        shift[TableColumn.FIRST_ROW] = part.first_row
        shift[TableColumn.FIRST_ELEMENT] = part.first_element
        return self._replace(
            rows=self.rows - part.first_row, fields=self.fields - shift, num_rows=part.num_rows
        )

    def multiplied(self, factor: float | Tensor) -> "TableEntries":
        """With the values of each entry times a number, or times one of [N]."""
        scales = self.scales
        if scales is None:
            dtype = accumulation(self.values.dtype)
            scales = torch.ones(self.rows.shape, dtype=dtype, device=self.rows.device)
        return self._replace(scales=(scales * factor).to(scales.dtype))

    def lie_like(self, other: "TableEntries") -> bool:
        """Whether both have the same tables; waits for the GPU only if the layer has been moved in between."""
        one, two = self.fields, other.fields
        if one.device != two.device:
            return False
        return one.data_ptr() == two.data_ptr() or torch.equal(one, two)

    def joined(self, other: "TableEntries") -> "TableEntries":
        """The entries of both, and the rows of `values` of both."""
        both = self, other
        if (self.scales is None) != (other.scales is None):
            both = self.multiplied(1.0), other.multiplied(1.0)
        one, two = both
        scales = max_positions = None
        if one.scales is not None and two.scales is not None:
            scales = torch.cat([one.scales, two.scales])
        if one.max_positions is not None and two.max_positions is not None:
            after = len(one.rows)
            max_positions = torch.cat(
                [one.max_positions.to(torch.int64), two.max_positions.to(torch.int64) + after]
            )
        first = len(one.values) * self.num_tables
        output_bag = torch.cat(
            [one.output_bag.to(torch.int64), two.output_bag.to(torch.int64) + first]
        )
        return one._replace(
            rows=torch.cat([one.rows, two.rows]),
            output_bag=narrow_positions(output_bag, first + len(two.values) * self.num_tables),
            scales=scales,
            max_positions=max_positions,
            values=torch.cat([one.values, two.values]),
        )

    def converted(self, convert: Callable[[Tensor], Tensor]) -> "TableEntries":
        """With other values, which may be of another dtype and on another device."""
        values = convert(self.values)
        device, scales, max_positions = values.device, self.scales, self.max_positions
        return self._replace(
            rows=self.rows.to(device),
            output_bag=self.output_bag.to(device),
            scales=None if scales is None else scales.to(device, accumulation(values.dtype)),
            max_positions=None if max_positions is None else max_positions.to(device),
            values=values,
            fields=self.fields.to(device),
        )

    def to_dense(self, shape: torch.Size) -> Tensor:
        """The buffer's gradient, rounded once."""
        dense = self.values.new_zeros(shape.numel() + 1)
        total = sums_of_rows(torch.where(self.in_table(), self.rows, -1), self.row_values())
        # Every entry of a row writes the same sum; what takes no part writes behind the end.
        dense[self.elements(shape.numel())] = total.to(dense.dtype)
        return dense[:-1].view(shape)


def narrow_positions(positions: Tensor, count: int) -> Tensor:
    """As int32 if count < 2**31."""
    return positions.to(torch.int32) if count < 2**31 else positions


def number_rows(rows: Tensor) -> Tensor:
    """The rows in use numbered anew, from 0 on, in their order -> int64 [N]; nothing waits for the GPU."""
    keys, order = rows.sort(stable=True)
    number = torch.zeros_like(keys, dtype=torch.int64)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=number[1:])
    return torch.empty_like(number).scatter_(0, order, number)


def sums_of_rows(rows: Tensor, values: Tensor) -> Tensor:
    """What the values [N, D] of each entry's row add up to -> [N, D]."""
    number = number_rows(rows)
    return torch.zeros_like(values).index_add_(0, number, values)[number]
