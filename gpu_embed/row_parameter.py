"""Some rows of a table as a parameter of their own, so that a param group can name them."""

import copy
from typing import Any

import torch
from torch import Tensor


class RowParameter(torch.nn.Parameter):
    """Rows of a parameter `[num_embeddings, embedding_dim]`, in its memory, for an optimizer of this package.

    No gradient is computed for it: the whole parameter's is, and an optimizer takes these rows' part of it.

    Attributes:
        whole: the parameter.
        first_row: where in it the rows begin.
        grad: their part of the whole's gradient; reading a sparse one waits for the GPU, which the optimizers
            of this package need not do. Setting it to None does so to the whole's.
    """

    whole: torch.nn.Parameter
    first_row: int

    def __new__(cls, whole: torch.nn.Parameter, first_row: int, num_rows: int) -> "RowParameter":
        rows = whole.detach().narrow(0, first_row, num_rows)
        self: RowParameter = torch.Tensor._make_subclass(cls, rows, whole.requires_grad)
        self.whole = whole
        self.first_row = first_row
        return self

    @property
    def grad(self) -> Tensor | None:
        grad = self.whole.grad
        if grad is None or not grad.is_sparse:
            return None if grad is None else grad.narrow(0, self.first_row, len(self))
        ids = grad._indices()[0] - self.first_row
        kept = (ids >= 0) & (ids < len(self))
        values = grad._values()[kept]
        return torch.sparse_coo_tensor(ids[kept][None], values, self.shape, check_invariants=False)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("the gradient of rows is part of the whole parameter's; set that")
        self.whole.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowParameter":
        return type(self)(copy.deepcopy(self.whole, memo), self.first_row, len(self))


def whole_of(param: Tensor) -> Tensor:
    """The parameter that has the gradient."""
    return param.whole if isinstance(param, RowParameter) else param
