"""An optimizer's state as it is saved: that of a batched layer by the names of its tables."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..row_parameter import num_rows_of, row_range_of
from ..row_update import StateLayout, arithmetic_dtype
from ..tables import RowRange

# Of each kind of state, such as "sum", the tensor of each table.
OfTables = dict[str, dict[str, Tensor]]


def by_table(
    state: Mapping[str, Any], layouts: Iterable[StateLayout], row_range: RowRange
) -> dict[str, Any]:
    """A parameter's state with a tensor for each kind and table, such as "sum.user", in the state's memory."""
    saved = dict(state)
    for layout in layouts:
        if layout.name in saved:
            parts = row_range.views(saved.pop(layout.name), layout.per_row)
            saved |= {f"{layout.name}.{table}": _alone(part) for table, part in parts.items()}
    return saved


def _alone(view: Tensor) -> Tensor:
    """The same memory as a storage of its own: a file gets a tensor's whole storage."""
    return view if view.is_meta else torch.from_dlpack(view)


def kind_of(key: str) -> str:
    """Which kind of state a key of `by_table` holds."""
    return key.partition(".")[0]


def flattened(state: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `by_table` again, where torch.distributed.checkpoint has cut them at the dot."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{table}": part for table, part in value.items()}
        else:
            flat[key] = value
    return flat


def of_tables(states: Iterable[Mapping[str, Any]], layouts: Iterable[StateLayout]) -> OfTables:
    """What the states of some parameters, flattened, hold of each table."""
    found: OfTables = {layout.name: {} for layout in layouts}
    for state in states:
        for key, value in state.items():
            kind, _, table = key.partition(".")
            if table and kind in found and isinstance(value, Tensor):
                found[kind][table] = value
    return found


def put_together(
    param: Tensor, layout: StateLayout, saved: OfTables, initial: float, present: Any
) -> Tensor | None:
    """One kind of state of all tables of a parameter; None: the saved state has none of that kind.

    Rows that nothing was saved for begin with `initial`.

    Args:
        present: this state as the optimizer has it, or None.

    Raises ValueError for a table that has shrunk, or whose rows are of another length.
    """
    row_range, parts = row_range_of(param), saved.get(layout.name)
    if row_range is None or not parts:
        return None
    shape, dtype = layout.shape(param, num_rows_of(param)), arithmetic_dtype(param.dtype)
    anywhere = {table for tables in saved.values() for table in tables}
    views = row_range.views(torch.empty(shape, device="meta"), layout.per_row)
    for table, view in views.items():
        needed = list(view.shape)
        part = parts.get(table)
        fits = table not in anywhere if part is None else _fits(part, needed)
        if not fits:
            raise ValueError(
                f"table {table!r} needs a state {layout.name} of shape {needed}, or of fewer rows, but the state to "
                f"be loaded has {'none' if part is None else list(part.shape)}"
            )
    if isinstance(present, Tensor) and (present.shape, present.dtype) == (shape, dtype):
        views = row_range.views(present, layout.per_row)
        # torch.distributed.checkpoint reads a file into the memory of the state.
        if all(table in parts and _place(parts[table]) == _place(views[table]) for table in views):
            return present
    whole = torch.full(shape, initial, dtype=dtype, device=param.device)
    for table, view in row_range.views(whole, layout.per_row).items():
        if table in parts:
            view[: len(parts[table])].copy_(parts[table])
    return whole


def _fits(part: Tensor, needed: list[int]) -> bool:
    return (
        part.dim() == len(needed)
        and list(part.shape[1:]) == needed[1:]
        and part.shape[0] <= needed[0]
    )


def _place(values: Tensor) -> tuple[Any, ...]:
    return values.data_ptr(), values.shape, values.stride(), values.dtype, values.device


def saved_rows(rows: Tensor, param: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of the rows that may change, bool [num_embeddings]; of a batched layer that of each table, copied."""
    row_range = row_range_of(param)
    if row_range is None:
        return rows
    return {name: mask.clone() for name, mask in row_range.views(rows, per_row=True).items()}


def rows_of_tables(rows: Mapping[str, Tensor], param: Tensor) -> Tensor:
    """The mask again, from that of each table; ValueError if they are not those of the parameter's tables."""
    row_range = row_range_of(param)
    found = {name: (mask.dtype, list(mask.shape)) for name, mask in rows.items()}
    needed: dict[str, tuple[torch.dtype, list[int]]] = {}
    if row_range is not None:
        tables = zip(row_range.names, row_range.num_embeddings, strict=True)
        needed = {name: (torch.bool, [num_rows]) for name, num_rows in tables}
    if found != needed:
        raise ValueError(f"rows: by table, masks like {needed} are needed, but got {found}")
    return torch.cat([rows[name].to(param.device) for name in needed])
