"""Where the tables of one buffer lie, and which features look up in them."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bounds import table_name_id

# Tables of different widths begin at a multiple of so many elements: 16 bytes in every dtype from 16 bits on.
TABLE_ALIGNMENT = 8
# By their number in `TableColumn.MODE`.
MODES = ("sum", "mean", "max")


class TableColumn(IntEnum):
    """The columns of `Tables.fields`: what a kernel knows of a feature and its table; as in kernels/tables."""

    FIRST_ROW = 0  # the table's first row, counted over the rows of all tables
    NUM_ROWS = 1
    FIRST_ELEMENT = 2  # where the table begins in the buffer
    DIM = 3
    FIRST_COLUMN = 4  # where the feature's columns begin in the output
    MODE = 5  # of MODES
    PADDING_IDX = 6  # -1: none
    NAME = 7  # the feature's `bounds.table_name_id`


class RowRange(NamedTuple):
    """The rows of tables that lie one behind another in the buffer."""

    first_row: int  # among the rows of all tables
    num_rows: int
    first_element: int  # where in the buffer they begin
    shape: tuple[int, ...]  # as a tensor: [rows, D] of one D, else [elements]
    # Of each of these tables.
    names: tuple[str, ...]
    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]

    def part(self, names: Sequence[str]) -> "RowRange":
        """Some of the tables, which lie side by side in this order."""
        first = self.names.index(names[0])
        tables = slice(first, first + len(names))
        rows, dims = self.num_embeddings[tables], self.embedding_dims[tables]
        is_matrix = len(self.shape) == 2
        sizes = [
            aligned(count * dim, 1 if is_matrix else TABLE_ALIGNMENT)
            for count, dim in zip(self.num_embeddings, self.embedding_dims, strict=True)
        ]
        alone = is_matrix or len(rows) == 1
        return RowRange(
            self.first_row + sum(self.num_embeddings[:first]),
            sum(rows),
            self.first_element + sum(sizes[:first]),
            (sum(rows), dims[0]) if alone else (sum(sizes[tables]),),
            self.names[tables],
            rows,
            dims,
        )

    def views(self, values: Tensor, per_row: bool = False) -> dict[str, Tensor]:
        """Each table's part, [V, D], in the memory of values of `shape`; or of [rows], if per_row, then [V]."""
        alignment = TABLE_ALIGNMENT if len(self.shape) == 1 and not per_row else 1
        flat, begin, parts = values.view(-1), 0, {}
        tables = zip(self.names, self.num_embeddings, self.embedding_dims, strict=True)
        for name, rows, dim in tables:
            shape = (rows,) if per_row else (rows, dim)
            size = torch.Size(shape).numel()
            parts[name] = flat.narrow(0, begin, size).view(shape)
            begin += aligned(size, alignment)
        return parts


@dataclass(frozen=True)
class TableLayout:
    """Tables one behind another in one buffer, and the features that look up in them, as the host knows them."""

    names: tuple[str, ...]
    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    modes: tuple[str, ...]  # of MODES
    padding_idx: tuple[int, ...]  # -1: none
    features: tuple[str, ...]  # in the order of their ids, and of their columns in the output
    feature_tables: tuple[int, ...]  # the table that each looks up in

    def __post_init__(self) -> None:
        # Not in a call, which may be compiled: torch.compile cannot fill a cached property.
        _ = self.num_features, self.is_uniform, self._shapes

    @cached_property
    def num_features(self) -> int:
        return len(self.features)

    @cached_property
    def feature_dims(self) -> tuple[int, ...]:
        """Columns of each feature."""
        return tuple(self.embedding_dims[table] for table in self.feature_tables)

    @property
    def num_tables(self) -> int:
        return len(self.names)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether the buffer is a matrix: all tables have one embedding_dim."""
        return len(set(self.embedding_dims)) == 1

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        return tuple(accumulate(self.num_embeddings, initial=0))[:-1]

    @cached_property
    def first_columns(self) -> tuple[int, ...]:
        """Where each feature's columns begin in the output."""
        return tuple(accumulate(self.feature_dims, initial=0))[:-1]

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
            aligned(rows * dim, alignment)
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
        sizes = self.names, self.num_embeddings, self.embedding_dims
        whole = RowRange(0, sum(self.num_embeddings), 0, self.buffer_shape, *sizes)
        return whole.part(self.names[first:end])

    def shape(self, pooled: bool) -> "TableShape":
        return self._shapes[pooled]

    @cached_property
    def _shapes(self) -> tuple["TableShape", "TableShape"]:
        """Of lookups of rows, and of pooled ones."""
        num_rows, mean = sum(self.num_embeddings), "mean" in self.modes
        widest, divisor = max(self.embedding_dims), gcd(*self.embedding_dims)
        return (
            TableShape(num_rows, widest, divisor, mean, False),
            TableShape(num_rows, widest, divisor, mean, True),
        )

    def fields(self, device: torch.device, empty: Collection[int] = ()) -> Tensor:
        """int64 [F, 8]: `TableColumn`'s values of each feature; the tables of these numbers have no rows."""
        num_rows = (
            0 if number in empty else rows for number, rows in enumerate(self.num_embeddings)
        )

        def of_tables(numbers: tuple[int, ...]) -> list[int]:
            return [numbers[table] for table in self.feature_tables]

        columns = (
            of_tables(self.first_rows),
            of_tables(tuple(num_rows)),
            of_tables(self.first_elements),
            self.feature_dims,
            self.first_columns,
            of_tables(tuple(MODES.index(mode) for mode in self.modes)),
            of_tables(self.padding_idx),
            [table_name_id(self.described(feature)) for feature in range(self.num_features)],
        )
        return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device=device)

    def described(self, feature: int) -> str:
        """What an error calls a feature."""
        name, table = self.features[feature], self.names[self.feature_tables[feature]]
        return f"table {table!r}" if name == table else f"feature {name!r} (table {table!r})"

    def table_of_column(self, device: torch.device) -> Tensor:
        """int32 [sum of the features' D]: whose each column of the pooled output is."""
        features = np.repeat(np.arange(self.num_features), self.feature_dims)
        return torch.tensor(features, dtype=torch.int32, device=device)


class Tables(NamedTuple):
    """A layout, and what the kernels read of it."""

    layout: TableLayout
    fields: Tensor  # int64 [F, 8]
    table_of_column: Tensor  # int32 [sum D]
    # int64 [F, 8]: as fields, but frozen tables have no rows. None: no table is frozen.
    trained_fields: Tensor | None = None

    @classmethod
    def of(
        cls, layout: TableLayout, device: torch.device, frozen: Collection[int] = ()
    ) -> "Tables":
        return cls(layout, layout.fields(device), layout.table_of_column(device)).freezing(frozen)

    def freezing(self, frozen: Collection[int]) -> "Tables":
        """The same with the tables of these numbers frozen, and no others."""
        fields = self.layout.fields(self.fields.device, frozen) if frozen else None
        return self._replace(trained_fields=fields)

    def in_order(self, features: Sequence[int]) -> "Tables":
        """As the kernels read them for the ids of features in this order."""

        trained = self.trained_fields
        return self._replace(
            fields=torch.stack([self.fields[n] for n in features]),
            trained_fields=None if trained is None else torch.stack([trained[n] for n in features]),
        )


class TableShape(NamedTuple):
    """What the host must know of a batched lookup beside its tensors' shapes."""

    num_rows: int  # of all tables
    widest: int  # the largest D
    dim_divisor: int  # the largest number that divides every D
    mean: bool  # whether any table takes means
    pooled: bool  # one output row a bag; else one an id
    # Where the output's is another than the tables': both. None: that of the tensors.
    table_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None


def make_layout(
    tables: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]],
    mode: str | Mapping[str, str] | Sequence[str],
    padding_idx: int | Mapping[str, int | None] | Sequence[int | None] | None,
    features: Mapping[str, str] | None = None,
) -> TableLayout:
    """Check a layer's arguments and lay its tables out.

    Args:
        tables: (num_embeddings, embedding_dim) of each, by name, or in a sequence, for the names "0", "1", ...
        mode, padding_idx: of all tables, or by name, or in a sequence. A name left out gets "sum" and None.
        features: the table that each feature looks up in; None: one feature a table, of its name.
    """
    if isinstance(tables, Mapping):
        names, values = tuple(tables), tuple(tables.values())
    elif isinstance(tables, Sequence) and not isinstance(tables, str):
        names, values = tuple(str(number) for number in range(len(tables))), tuple(tables)
    else:
        raise TypeError(
            "tables must be a mapping from names to (num_embeddings, embedding_dim), or a sequence of such pairs, "
            f"got {type(tables).__name__}"
        )
    if not names:
        raise ValueError("at least one table is needed")
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            # They are parts of state_dict's keys.
            raise ValueError(
                f"a table's name is a string that is not empty and has no '.', got {name!r}"
            )
    sizes = [_size(name, value) for name, value in zip(names, values, strict=True)]
    modes = per_table("mode", mode, names, "sum")
    for name, one in zip(names, modes, strict=True):
        if one not in MODES:
            raise ValueError(f"table {name!r}: mode has to be one of sum, mean, max, got {one!r}")
    paddings = per_table("padding_idx", padding_idx, names, None)
    of_features = _check_features(features, names)
    return TableLayout(
        names,
        tuple(rows for rows, _ in sizes),
        tuple(dim for _, dim in sizes),
        tuple(modes),
        tuple(
            _wrap_padding_idx(name, one, rows)
            for name, one, (rows, _) in zip(names, paddings, sizes, strict=True)
        ),
        tuple(of_features),
        tuple(names.index(table) for table in of_features.values()),
    )


def aligned(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment


def _size(name: str, value: object) -> tuple[int, int]:
    """num_embeddings and embedding_dim of a table."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(
            f"table {name!r}: expected (num_embeddings, embedding_dim), a pair of ints, got {value!r}"
        )
    rows, dim = (
        as_int(f"table {name!r}: {what}", number)
        for what, number in zip(("num_embeddings", "embedding_dim"), value, strict=True)
    )
    if rows < 0 or dim < 1:
        raise ValueError(
            f"table {name!r}: num_embeddings must be at least 0 and embedding_dim at least 1, "
            f"got {rows} and {dim}"
        )
    return rows, dim


def as_int(what: str, value: Any) -> int:
    """An int; NumPy's integers are fine, True is not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, got {value!r}") from None


def _check_features(features: Mapping[str, str] | None, names: tuple[str, ...]) -> dict[str, str]:
    """The name of each feature's table."""
    if features is None:
        return {name: name for name in names}
    if not isinstance(features, Mapping):
        raise TypeError(
            "features must be a mapping from each feature's name to its table's, such as "
            f'{{"item": "item", "history": "item"}}, got {type(features).__name__}'
        )
    for feature, table in features.items():
        if not isinstance(feature, str) or not feature:
            raise ValueError(f"a feature's name is a string that is not empty, got {feature!r}")
        if table not in names:
            raise ValueError(
                f"feature {feature!r}: no table is named {table!r}, the tables are {quoted(names)}"
            )
    unused = [name for name in names if name not in features.values()]
    if unused:
        raise ValueError(f"no feature looks up in {quoted(unused)}")
    return dict(features)


def quoted(names: Iterable[str], most: int = 8) -> str:
    """Names in a message, the first of them where they are many."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def per_table(argument: str, value: object, names: tuple[str, ...], default: object) -> list:
    """A value for each table, given one for all, by name, or in a sequence."""
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in names]
        if unknown:
            raise ValueError(
                f"{argument}: no table is named {unknown[0]!r}, the tables are {quoted(names)}"
            )
        return [value.get(name, default) for name in names]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(names):
            raise ValueError(f"{argument}: {len(value)} values for {len(names)} tables")
        return list(value)
    return [value] * len(names)


def _wrap_padding_idx(name: str, padding_idx: int | None, num_embeddings: int) -> int:
    if padding_idx is None:
        return -1
    padding_idx = as_int(f"table {name!r}: padding_idx", padding_idx)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"table {name!r}: padding_idx must be within num_embeddings, {num_embeddings}, got {padding_idx}"
        )
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx
