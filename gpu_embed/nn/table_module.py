"""One table of a batched layer as a submodule, so that the keys of its state_dict are paths to tensors."""

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tables import BatchedTables

GONE = "the layer of this table is gone; keep the layer, or copy the rows"


class Table(torch.nn.Module):
    """The place of one table: `layer.user.weight` is what `state_dict` calls "user.weight".

    It owns nothing: the layer's one parameter holds the rows, and `parameters()` has none of them. Tools that take
    a state_dict key for a path (`torch.distributed.checkpoint`, `torch.func.functional_call`, accelerate,
    transformers) read and write the table here.

    Attributes:
        weight: the rows, `[num_embeddings, embedding_dim]`, in the parameter's memory.
    """

    weight: torch.nn.Parameter

    def __init__(self, layer: "BatchedTables", number: int) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _Rows(layer, number)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            self._parameters.assign(value)  # type: ignore[attr-defined]
        else:
            raise TypeError(
                f"the weight of a table must be a tensor [num_embeddings, embedding_dim], got {type(value).__name__}"
            )

    def requires_grad_(self, requires_grad: bool = True) -> "Table":
        """Freeze this table alone, or train it again."""
        self._parameters.layer._freeze(self._parameters.number, requires_grad)  # type: ignore[attr-defined]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        layer, number = self._parameters.layer, self._parameters.number  # type: ignore[attr-defined]
        if layer._holds_tables():
            rows = layer._rows(number)
            destination[f"{prefix}weight"] = rows if keep_vars else detached(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> "Table":
        if not self._parameters.layer._is_applying:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"table {self._parameters.name!r} lies in its layer's one parameter, "  # type: ignore[attr-defined]
                "and moves and converts only as a part of it: call the layer's method"
            )
        return self

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the layer loads all of its tables together."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's, for this table alone; with assign=True, too, the rows are copied into the layer's parameter."""
        holder = torch.nn.Module()
        rows = self._parameters["weight"]
        assert rows is not None
        holder.weight = torch.nn.Parameter(rows.detach(), rows.requires_grad)
        result = holder.load_state_dict(state_dict, strict, assign)
        if holder.weight.data_ptr() != rows.data_ptr():
            self._parameters.assign(holder.weight)  # type: ignore[attr-defined]
        return result

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"{rows}, {dim}"


class _Rows(dict[str, Any]):
    """The `_parameters` of a `Table`: it has a "weight" for whoever asks by name, and lists none."""

    def __init__(self, layer: "BatchedTables", number: int) -> None:
        super().__init__()
        # Not a reference: a layer and its tables would keep each other alive, and with them the GPU's memory.
        self._layer = weakref.ref(layer)
        self.number = number

    @property
    def layer(self) -> "BatchedTables":
        layer = self._layer()
        if layer is None:
            raise RuntimeError(GONE)
        return layer

    @property
    def name(self) -> str:
        return self.layer.layout.names[self.number]

    def __contains__(self, name: object) -> bool:
        return name == "weight"

    def __getitem__(self, name: str) -> Any:
        if name != "weight":
            raise KeyError(name)
        return self.layer._rows(self.number)

    def __setitem__(self, name: str, value: Any) -> None:
        """Look up in other rows, until what was here is put back."""
        if name != "weight":
            raise KeyError(f"a table has no parameter {name!r} beside its weight")
        self.layer._replace_rows(self.number, value)

    def __delitem__(self, name: str) -> None:
        raise KeyError(
            f"{name!r} of a table is part of its layer's parameter and cannot be removed"
        )

    def get(self, name: str, default: Any = None) -> Any:
        return self["weight"] if name == "weight" else default

    def assign(self, value: Tensor) -> None:
        self.layer._assign_rows(self.number, value)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Rows":
        layer = memo.get(id(self.layer))
        return self.__reduce__() if layer is None else _Rows(layer, self.number)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a table cannot be copied or saved without its layer; use layer.to_modules()[name], or the rows, "
            "layer[name]"
        )


def freezable(layer: "BatchedTables", number: int, rows: Tensor) -> Tensor:
    """The rows of a table, whose `requires_grad_` freezes the table or trains it again."""
    # Not over the rows themselves, a cycle that would keep their memory. Saved without it.
    own = {"requires_grad_": _OfTable(layer, number), "__getstate__": dict}
    rows.__dict__ = _OfRows(rows.__dict__ | own)
    return rows


class _OfRows(dict[str, Any]):
    """The attributes of a table's rows, of which a copy is no table's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        others = self.keys() - {"requires_grad_", "__getstate__"}
        return {name: copy.deepcopy(self[name], memo) for name in others}


class _OfTable:
    """`requires_grad_` of a table's rows."""

    def __init__(self, layer: "BatchedTables", number: int) -> None:
        self._layer = weakref.ref(layer)
        self._number = number

    def __call__(self, requires_grad: bool = True) -> Tensor:
        """The table's rows, as they are then."""
        layer = self._layer()
        if layer is None:
            raise RuntimeError(GONE)
        layer._freeze(self._number, requires_grad)
        return layer[layer.layout.names[self._number]]


class OfAllTables:
    """`requires_grad_` of a layer's parameter while some tables are frozen alone: it is meant for all of them.

    By it `requires_grad_` of a model, which asks each parameter, unfreezes them.
    """

    def __init__(self, layer: "BatchedTables | None" = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)

    def __call__(self, requires_grad: bool = True) -> Tensor:
        layer = None if self._layer is None else self._layer()
        if layer is None:
            raise RuntimeError(GONE)
        layer._set_frozen(frozenset())
        return layer.weight.requires_grad_(requires_grad)

    def __reduce__(self) -> Any:
        # A copied layer gives its parameter its own.
        return OfAllTables, ()


def detached(rows: Tensor) -> Tensor:
    """Rows of a parameter as an entry of a state_dict: the same memory, in a storage of its own.

    Whoever saves a tensor saves its whole storage, and takes tensors of one storage for tied ones. The entry shares
    the parameter's version, so that autograd notices a write to it.
    """
    entry = rows.detach()
    # Meta tensors have no memory, and fake ones no data.
    if type(entry) is Tensor and entry.device.type in ("cpu", "cuda"):
        entry.data = torch.from_dlpack(rows.detach())
    return entry
