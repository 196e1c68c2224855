"""Some rows of a table as a parameter of their own, so that a param group can name them."""

import copy
from typing import Any

import torch
from torch import Tensor

from .gradient import TableGradient
from .layout import RowRange


class RowParameter(torch.nn.Parameter):
    """Rows of a layer's parameter, in its memory, for an optimizer of this package.

    They are `[rows, embedding_dim]`, or, of several tables of different embedding_dims, `[elements]`. No gradient
    is computed for them: the whole parameter's is, and an optimizer takes these rows' part of it.

    Attributes:
        whole: the parameter.
        row_range: which of its rows these are.
        grad: their part of the whole's gradient; of a sparse one a `TableGradient`, which shares its memory.
            Setting it to None does so to the whole's. Dense zeros can be set, which are these rows' own gradient
            then, while the whole's stays; other values raise ValueError.
    """

    whole: torch.nn.Parameter
    row_range: RowRange
    zeros: Tensor | None  # a gradient of their own

    def __new__(cls, whole: torch.nn.Parameter, row_range: RowRange) -> "RowParameter":
        rows = _rows_of(whole, row_range)
        self: RowParameter = torch.Tensor._make_subclass(cls, rows, whole.requires_grad)
        self.whole = whole
        self.row_range = row_range
        self.zeros = None
        return self

    def follow(self) -> None:
        """Go where the whole has gone: `layer.to(...)` gives it other memory."""
        rows = _rows_of(self.whole, self.row_range)
        if (rows.data_ptr(), rows.dtype, rows.device) != (self.data_ptr(), self.dtype, self.device):
            self.data = rows

    @property
    def grad(self) -> Tensor | None:
        if self.zeros is not None:
            return self.zeros
        grad = self.whole.grad
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
            self.whole.grad = None
        # torch.distributed.checkpoint sets zeros, for a step that makes the state.
        elif value.shape != self.shape or value.layout is not torch.strided or value.any():
            raise ValueError("the gradient of rows is part of the whole parameter's; set that")
        self.zeros = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowParameter":
        return type(self)(copy.deepcopy(self.whole, memo), self.row_range)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.whole, self.row_range)


def _rows_of(whole: Tensor, part: RowRange) -> Tensor:
    elements = torch.Size(part.shape).numel()
    return whole.detach().view(-1).narrow(0, part.first_element, elements).view(part.shape)


def whole_of(param: Tensor) -> Tensor:
    """The parameter that has the gradient."""
    return param.whole if isinstance(param, RowParameter) else param


def gradient_of(param: Tensor) -> Tensor | None:
    """The gradient that an optimizer applies: the whole's, unless rows have one of their own."""
    if isinstance(param, RowParameter) and param.zeros is not None:
        return param.zeros
    return whole_of(param).grad


def row_range_of(param: Tensor) -> RowRange | None:
    """Which rows of a layer's parameter it is; None: a table of its own."""
    row_range: RowRange | None = getattr(param, "row_range", None)
    return row_range


def num_rows_of(param: Tensor) -> int:
    row_range = row_range_of(param)
    return param.shape[0] if row_range is None else row_range.num_rows
