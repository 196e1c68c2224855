"""The sparse gradient of tables of different widths: which rows, and where in the output's gradient they lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..row_update import arithmetic_dtype
from .entries import sums_of_rows
from .layout import MODES, RowRange, TableField


class TableEntries(NamedTuple):
    """One entry an id, in the order of the ids. Its values are not its own: columns of a row of `values`, scaled."""

    rows: Tensor  # int64 [N], among the rows of all tables; others take no part
    sources: Tensor  # int32 or int64 [N]: the columns of table t in row b of values are b * T + t
    scales: Tensor | None  # [N], in the dtype of the arithmetic: multiplies them; None: 1
    # int32 or int64 [B, sum D]: the one entry that has them, where a table takes maxima; None: none does.
    winner: Tensor | None
    values: Tensor  # [B, sum D], any strides
    fields: Tensor  # int64 [T, 8], as of `TableBatch`
    num_rows: int  # of all tables
    widest: int  # the largest D
    dim_divisor: int  # the largest number that divides every D

    @property
    def num_tables(self) -> int:
        return self.fields.shape[0]

    def field(self, number: int) -> Tensor:
        """One of `TableField` for each entry's table, int64 [N]."""
        return self.fields[:, number][self.sources.to(torch.int64) % self.num_tables]

    def fields_by_row(self) -> Tensor:
        """`fields` with ascending first rows, to search for a row's table."""
        first_row, num_rows = (
            self.fields[:, column] for column in (TableField.FIRST_ROW, TableField.NUM_ROWS)
        )
        # A table without rows begins where the next one does, and must come before it.
        return self.fields[(2 * first_row + (num_rows > 0)).argsort(stable=True)]

    def in_table(self) -> Tensor:
        """Which entries take part -> bool [N]."""
        return (self.rows >= 0) & (self.rows < self.num_rows)

    def in_row(self) -> Tensor:
        """Which columns each entry has -> bool [N, widest]."""
        columns = torch.arange(self.widest, device=self.rows.device)
        return self.in_table()[:, None] & (columns < self.field(TableField.DIM)[:, None])

    def elements(self, otherwise: int) -> Tensor:
        """Where in the buffer the columns of each entry's row lie -> int64 [N, widest]; `otherwise` where nowhere."""
        row = self.rows - self.field(TableField.FIRST_ROW)
        begin = self.field(TableField.FIRST_ELEMENT) + row * self.field(TableField.DIM)
        columns = torch.arange(self.widest, device=begin.device)
        return torch.where(self.in_row(), begin[:, None] + columns, otherwise)

    def row_values(self) -> Tensor:
        """The values themselves, in the dtype of the arithmetic -> [N, widest], zero behind each D."""
        dtype = arithmetic_dtype(self.values.dtype)
        in_row = self.in_row()
        if self.values.numel() == 0:
            return self.values.new_zeros(in_row.shape, dtype=dtype)
        bag = (self.sources.to(torch.int64) // self.num_tables)[:, None]
        columns = torch.arange(self.widest, device=bag.device)
        column = torch.where(in_row, self.field(TableField.FIRST_COLUMN)[:, None] + columns, 0)
        used = in_row
        if self.winner is not None:
            place = torch.arange(len(self.rows), device=bag.device)[:, None]
            is_max = self.field(TableField.MODE)[:, None] == MODES.index("max")
            used = used & (~is_max | (self.winner[bag, column] == place))
        values = self.values[bag, column].to(dtype)
        if self.scales is not None:
            values = values * self.scales[:, None]
        return torch.where(used, values, 0)

    def within(self, part: RowRange) -> "TableEntries":
        """The same with rows and elements counted from a part's first on; rows outside of it take no part."""
        if part.first_element == 0:
            return self._replace(num_rows=part.num_rows)
        shift = torch.zeros_like(self.fields[0])
        shift[TableField.FIRST_ROW] = part.first_row
        shift[TableField.FIRST_ELEMENT] = part.first_element
        return self._replace(
            rows=self.rows - part.first_row, fields=self.fields - shift, num_rows=part.num_rows
        )

    def multiplied(self, factor: float | Tensor) -> "TableEntries":
        """With the values of each entry times a number, or times one of [N]."""
        scales = self.scales
        if scales is None:
            dtype = arithmetic_dtype(self.values.dtype)
            scales = torch.ones(self.rows.shape, dtype=dtype, device=self.rows.device)
        return self._replace(scales=(scales * factor).to(scales.dtype))

    def lie_like(self, other: "TableEntries") -> bool:
        """Whether both are of the same tables; only of a layer that has been moved in between it waits for the GPU."""
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
        scales = winner = None
        if one.scales is not None and two.scales is not None:
            scales = torch.cat([one.scales, two.scales])
        if one.winner is not None and two.winner is not None:
            after = len(one.rows)
            winner = torch.cat([one.winner.to(torch.int64), two.winner.to(torch.int64) + after])
        first = len(one.values) * self.num_tables
        sources = torch.cat([one.sources.to(torch.int64), two.sources.to(torch.int64) + first])
        return one._replace(
            rows=torch.cat([one.rows, two.rows]),
            sources=narrow_positions(sources, first + len(two.values) * self.num_tables),
            scales=scales,
            winner=winner,
            values=torch.cat([one.values, two.values]),
        )

    def converted(self, convert: Callable[[Tensor], Tensor]) -> "TableEntries":
        """With other values, which may be of another dtype and on another device."""
        values = convert(self.values)
        device, scales, winner = values.device, self.scales, self.winner
        return self._replace(
            rows=self.rows.to(device),
            sources=self.sources.to(device),
            scales=None if scales is None else scales.to(device, arithmetic_dtype(values.dtype)),
            winner=None if winner is None else winner.to(device),
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
    """int32 where so many are no more."""
    return positions.to(torch.int32) if count < 2**31 else positions


class _Store:
    """The entries that a gradient, and whatever shares its memory, has."""

    def __init__(self, entries: TableEntries) -> None:
        self.entries = entries

    @property
    def entries(self) -> TableEntries:
        if self._entries.values._version != self._version:
            raise RuntimeError(
                "the gradient of a batched layer's output was modified by an inplace operation, but the sparse "
                "gradient of its tables still reads it; change it after the optimizer's step"
            )
        return self._entries

    @entries.setter
    def entries(self, entries: TableEntries) -> None:
        self._entries = entries
        self._version = entries.values._version

    def multiply_(self, factor: Tensor) -> None:
        """factor: one for each entry, or one number."""
        self.entries = self.entries.multiplied(factor)


class _SparseStore(_Store):
    """Those of torch's sparse gradient of a matrix [V, D], in its memory."""

    def __init__(self, grad: Tensor) -> None:
        num_rows, dim = grad.shape
        rows, values = grad._indices()[0], grad._values()
        fields = torch.zeros(1, 8, dtype=torch.int64, device=rows.device)
        fields[0, TableField.NUM_ROWS] = num_rows
        fields[0, TableField.DIM] = dim
        sources = torch.arange(len(rows), device=rows.device)
        super().__init__(
            TableEntries(rows, sources, None, None, values, fields, num_rows, dim, dim)
        )

    def multiply_(self, factor: Tensor) -> None:
        self.entries.values.mul_(factor.reshape(-1, 1))
        self.entries = self._entries


class TableGradient(Tensor):
    """What a batched layer with sparse=True and tables of different embedding_dims leaves in `weight.grad`.

    One entry an id, not summed, as in torch's sparse gradients. But those want rows of one width, and how many ids
    each table has is known to the GPU alone: so rows would have to be padded to the widest table's, or every
    element be given an index of 8 bytes. This one copies no values at all: an entry names a row, and where in the
    gradient of the layer's output its values lie. It takes 12 bytes an id beside that gradient, 16 with a weight,
    and where maxima are taken 4 bytes an element of the output.

    It is a tensor of the parameter's shape. Several are added up, multiplied and divided by a number, moved and
    converted as such, also by `GradScaler`, and by `gpu_embed.optim.clip_grad_norm_`; the optimizers of
    `gpu_embed.optim` read it as it is. Every other operator gets the dense gradient, whose size is the buffer's;
    but none writes to it in place.

    Attributes:
        entries: `TableEntries`.
    """

    _store: _Store
    _part: RowRange | None  # None: all rows

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, entries: TableEntries | _Store, shape: torch.Size, part: RowRange | None = None
    ) -> "TableGradient":
        store = entries if isinstance(entries, _Store) else _Store(entries)
        values = store.entries.values
        self: TableGradient = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=values.dtype, device=values.device
        )
        self._store = store
        self._part = part
        return self

    @property
    def entries(self) -> TableEntries:
        entries = self._store.entries
        return entries if self._part is None else entries.within(self._part)

    @classmethod
    def of_sparse(cls, grad: Tensor) -> "TableGradient":
        """torch's sparse gradient of a matrix, in its memory."""
        return cls(_SparseStore(grad), grad.shape)

    def of(self, part: RowRange) -> "TableGradient":
        """A part's rows of it; what is multiplied there is so here."""
        return TableGradient(self._store, torch.Size(part.shape), part)

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.entries.to_dense(self.shape)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> "TableGradient":
        """With what a function makes of the values, as `torch.nn.Module._apply` wants it."""
        return TableGradient(self.entries.converted(convert), self.shape)

    def times_(self, factor: Tensor) -> "TableGradient":
        """Multiply all values by a tensor of one element, in place."""
        if self._part is None:
            self._store.multiply_(factor)
        else:
            self._store.multiply_(torch.where(self.entries.in_table(), factor, 1))
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"TableGradient(entries={len(self.entries.rows)}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TableGradient":
        memo[id(self)] = copied = self.clone()
        return copied  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return TableGradient, (self.entries, self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and any(isinstance(one, TableGradient) for one in tree_leaves(value)):
                raise RuntimeError(
                    f"{func}: the gradient of tables of different embedding_dims cannot be changed in this way, "
                    "only multiplied by a number or added to another such gradient; call its to_dense() first"
                )
        args, kwargs = tree_map(_dense, (args, kwargs))
        return func(*args, **kwargs)


def _dense(value: Any) -> Any:
    return value.to_dense() if isinstance(value, TableGradient) else value


# What is done without the dense gradient. NotImplemented: with it, after all.


def _alias(self: TableGradient) -> TableGradient:
    return TableGradient(self._store, self.shape, self._part)


def _clone(self: TableGradient, *, memory_format: Any = None) -> TableGradient:
    # Whoever writes to one replaces the tensors, so that they can be shared.
    return self.converted(torch.clone)


def _to_copy(
    self: TableGradient,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Any:
    dtype = dtype or self.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    return self.converted(lambda values: values.to(device, dtype))


def _joinable(self: Any, other: Any) -> bool:
    return (
        isinstance(self, TableGradient)
        and isinstance(other, TableGradient)
        and self.shape == other.shape
        and self.dtype == other.dtype
        and self.entries.lie_like(other.entries)
    )


def _add(self: Any, other: Any, *, alpha: float = 1) -> Any:
    if not _joinable(self, other):
        return NotImplemented
    return TableGradient(self.entries.joined(_times(other.entries, alpha)), self.shape)


def _add_(self: Any, other: Any, *, alpha: float = 1) -> Any:
    if not _joinable(self, other) or self._part is not None:
        return NotImplemented
    self._store.entries = self.entries.joined(_times(other.entries, alpha))
    return self


def _times(entries: TableEntries, factor: float) -> TableEntries:
    return entries if factor == 1 else entries.multiplied(factor)


def _number(self: Any, other: Any) -> Tensor | None:
    """Something to multiply a gradient by; None: it is no number."""
    if not isinstance(self, TableGradient) or isinstance(other, TableGradient):
        return None
    if isinstance(other, Tensor) and (other.dim() > 0 or other.is_complex()):
        return None
    if isinstance(other, complex):
        return None
    dtype = arithmetic_dtype(self.dtype)
    if isinstance(other, Tensor) and other.device == self.device:
        return other.to(dtype)
    # Made on the device, as a copy to it would wait.
    return torch.full((), float(other), dtype=dtype, device=self.device)


def _mul(self: Any, other: Any) -> Any:
    number = _number(self, other)
    if number is None:
        return NotImplemented
    return TableGradient(self.entries.multiplied(number), self.shape)


def _mul_(self: Any, other: Any) -> Any:
    number = _number(self, other)
    return NotImplemented if number is None else self.times_(number)


def _div(self: Any, other: Any) -> Any:
    number = _number(self, other)
    return NotImplemented if number is None else _mul(self, 1 / number)


def _div_(self: Any, other: Any) -> Any:
    number = _number(self, other)
    return NotImplemented if number is None else self.times_(1 / number)


def _zero_(self: TableGradient) -> Any:
    if self._part is not None:
        return NotImplemented
    entries = self.entries
    none = entries.rows[:0]
    # As torch's sparse gradients: without entries.
    self._store.entries = entries._replace(
        rows=none,
        sources=none,
        scales=None,
        winner=None if entries.winner is None else entries.winner[:0],
        values=entries.values[:0],
    )
    return self


def _unscale_(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """`GradScaler`'s: looks for numbers that are not finite, and multiplies."""
    plain = [grad for grad in grads if not isinstance(grad, TableGradient)]
    if plain:
        torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inv_scale)
    for grad in grads:
        if isinstance(grad, TableGradient):
            # Of the values that are some row's gradient; an empty bag's are none's.
            found = (~grad.entries.row_values().isfinite()).any()
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.dtype)))
            grad.times_(inv_scale.to(arithmetic_dtype(grad.dtype)).reshape(()))


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _add_,
    _aten.mul.Tensor: _mul,
    _aten.mul.Scalar: _mul,
    _aten.mul_.Tensor: _mul_,
    _aten.mul_.Scalar: _mul_,
    _aten.div.Tensor: _div,
    _aten.div.Scalar: _div,
    _aten.div_.Tensor: _div_,
    _aten.div_.Scalar: _div_,
    _aten.zero_.default: _zero_,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
}
