"""Some rows of a table as a parameter of their own, so that a param group can name them."""

import copy
from typing import Any

import torch
from torch import Tensor

from .gradient import TableGradient
from .layout import RowRange


class TableSlice(torch.nn.Parameter):
    """A view of a parent's rows, the parameter of a layer, for an optimizer of this package.

    It is `[rows, embedding_dim]`, or, of several tables of different embedding_dims, `[elements]`. No gradient
    is computed for it: the parent's is, and an optimizer takes these rows' part of it.

    Attributes:
        parent: the layer's parameter.
        row_range: which of its rows these are; it follows a layer that grows.
        grad: their part of the parent's gradient; of a sparse one a `TableGradient`, which shares its memory.
            `.grad = None` also clears the parent's. Dense zeros can be set, which are these rows' own gradient
            then, while the parent's stays; other values raise ValueError.
    """

    parent: torch.nn.Parameter
    zeros: Tensor | None  # a gradient of their own
    _row_range: RowRange
    _seen: RowRange | None  # the parent's of that time

    def __new__(cls, parent: torch.nn.Parameter, row_range: RowRange) -> "TableSlice":
        rows = _rows_of(parent, row_range)
        self: TableSlice = torch.Tensor._make_subclass(cls, rows, parent.requires_grad)
        self.parent = parent
        self._row_range = row_range
        self._seen = row_range_of(parent)
        self.zeros = None
        return self

    @property
    def row_range(self) -> RowRange:
        whole, own = row_range_of(self.parent), self._row_range
        if whole is not self._seen and whole is not None:
            self._seen = whole
            now = whole.part(own.names)
            if now._replace(shape=own.shape) != own:
                self._row_range = now
        return self._row_range

    def rebind(self) -> None:
        """View the parent's memory of now: `layer.to(...)` and `layer.grow(...)` give it other memory."""
        rows = _rows_of(self.parent, self.row_range)
        if _place(rows) != _place(self):
            self.data = rows

    def requires_grad_(self, requires_grad: bool = True) -> "TableSlice":
        """RuntimeError: the gradient is the parent's, whatever is said here."""
        raise RuntimeError(
            "rows as a parameter have no gradient of their own to turn off; freeze a table by "
            "layer[name].requires_grad_(False)"
        )

    @property
    def grad(self) -> Tensor | None:
        if self.zeros is not None:
            return self.zeros
        grad = self.parent.grad
        if grad is None:
            return None
        if grad.is_sparse:
            grad = TableGradient.of_sparse(grad)
        if isinstance(grad, TableGradient):
            return grad.of(self.row_range)
        return _rows_of(grad, self.row_range)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self.parent.grad = None
        # torch.distributed.checkpoint sets zeros, for a step that makes the state.
        elif value.shape != self.shape or value.layout is not torch.strided or value.any():
            raise ValueError("the gradient of rows is part of the whole parameter's; set that")
        self.zeros = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "TableSlice":
        return type(self)(copy.deepcopy(self.parent, memo), self.row_range)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.parent, self.row_range)


def _rows_of(parent: Tensor, part: RowRange) -> Tensor:
    elements = torch.Size(part.shape).numel()
    return parent.detach().view(-1).narrow(0, part.first_element, elements).view(part.shape)


def _place(rows: Tensor) -> tuple[Any, ...]:
    return rows.data_ptr(), rows.shape, rows.dtype, rows.device


def parent_of(param: Tensor) -> Tensor:
    """The parameter that has the gradient."""
    return param.parent if isinstance(param, TableSlice) else param


def gradient_of(param: Tensor) -> Tensor | None:
    """The gradient that an optimizer applies: the parent's, unless rows have one of their own."""
    if isinstance(param, TableSlice) and param.zeros is not None:
        return param.zeros
    return parent_of(param).grad


def row_range_of(param: Tensor) -> RowRange | None:
    """Which rows of a layer's parameter it is; None: a table of its own."""
    row_range: RowRange | None = getattr(param, "row_range", None)
    return row_range


def num_rows_of(param: Tensor) -> int:
    row_range = row_range_of(param)
    return param.shape[0] if row_range is None else row_range.num_rows
