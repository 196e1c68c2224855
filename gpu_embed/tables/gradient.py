"""The sparse gradient of tables of different widths: which rows, and where in the output's gradient they lie."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..dtypes import accumulation
from .entries import TableEntries
from .layout import RowRange, TableColumn


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
        fields[0, TableColumn.NUM_ROWS] = num_rows
        fields[0, TableColumn.DIM] = dim
        output_bag = torch.arange(len(rows), device=rows.device)
        super().__init__(
            TableEntries(rows, output_bag, None, None, values, fields, num_rows, dim, dim)
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
    dtype = accumulation(self.dtype)
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
        output_bag=none,
        scales=None,
        max_positions=None if entries.max_positions is None else entries.max_positions[:0],
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
            grad.times_(inv_scale.to(accumulation(grad.dtype)).reshape(()))


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
