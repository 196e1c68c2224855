"""An optimizer's state as it is saved: of a batched layer by the names of its tables, of a sharded one as DTensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulation
from ..row_update import StateLayout
from ..tables.layout import RowRange, quoted
from ..tables.parameter import num_rows_of, row_range_of

# Of each kind of state, such as "sum", the tensor of each table.
OfTables = dict[str, dict[str, Tensor]]


def sharding_of(param: Any) -> Any:
    """The `distributed.RowSharding` of a parameter that is one rank's rows of a larger table, or None."""
    return getattr(param, "row_sharding", None)


def as_saved(
    state: Mapping[str, Any], layouts: Iterable[StateLayout], param: Tensor
) -> Mapping[str, Any]:
    """A parameter's state as it is saved."""
    row_range, sharding = row_range_of(param), sharding_of(param)
    if row_range is not None:
        return by_table(state, layouts, row_range)
    if sharding is None:
        return state
    names = [layout.name for layout in layouts if layout.name in state]
    return {**state, **{name: sharding.whole(state[name]) for name in names}}


def of_rank(value: Any, param: Tensor) -> Any:
    """This rank's part of a state of the whole table; anything else as it is."""
    sharding = sharding_of(param)
    if sharding is None or not isinstance(value, Tensor):
        return value
    return sharding.own(value) if value.shape[:1] == (sharding.num_embeddings,) else value


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
    shape, dtype = layout.shape(param, num_rows_of(param)), accumulation(param.dtype)
    anywhere = {table for tables in saved.values() for table in tables}
    views = row_range.views(torch.empty(shape, device="meta"), layout.per_row)
    for table, view in views.items():
        needed = list(view.shape)
        part = parts.get(table)
        fits = table not in anywhere if part is None else _fits(part, needed)
        if not fits:
            raise ValueError(
                f"table {table!r} needs a state {layout.name} of shape {needed}, with at most that many rows, but the "
                f"state to be loaded has {'none' if part is None else list(part.shape)}; layer.grow() adds rows"
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


def shared_state(
    param: Tensor, own: Mapping[str, Any], saved: Iterable[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The saved state of which `param` takes what is no table's, its step: that of the parameter that had its tables.

    Args:
        own: the state that was saved at the parameter's place.
        saved: those of all parameters of the layer, flattened.

    Raises ValueError where its tables were saved with different steps.
    """
    row_range = row_range_of(param)
    tables_of = [(state, {key.partition(".")[2] for key in state} - {""}) for state in saved]
    if row_range is None or not any(tables for _, tables in tables_of):
        return own
    found = {
        name: state for state, tables in tables_of for name in row_range.names if name in tables
    }
    steps = {name: step_number(state.get("step", 0)) for name, state in found.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"tables that are one parameter now were saved with different steps, {steps}: give each its own, by "
            "parameters_of(name)"
        )
    # Tables that are all new begin with step 1.
    return next((found[name] for name in row_range.names if name in found), {"step": 0})


def step_number(step: Any) -> int:
    """A saved step as an int; ValueError for what is no number."""
    try:
        return int(step)
    except (TypeError, ValueError):
        raise ValueError(f"the state to be loaded has a step that is no number: {step!r}") from None


def _fits(part: Tensor, needed: list[int]) -> bool:
    return (
        part.dim() == len(needed)
        and list(part.shape[1:]) == needed[1:]
        and part.shape[0] <= needed[0]
    )


def _place(values: Tensor) -> tuple[Any, ...]:
    return values.data_ptr(), values.shape, values.stride(), values.dtype, values.device


def saved_rows(rows: Tensor, param: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of the rows that may change, bool [num_embeddings]; of a batched layer that of each table, copied.

    Of a sharded table it is that of all ranks' rows.
    """
    row_range, sharding = row_range_of(param), sharding_of(param)
    if sharding is not None:
        whole: Tensor = sharding.whole(rows).full_tensor()
        return whole
    if row_range is None:
        return rows
    return {name: mask.clone() for name, mask in row_range.views(rows, per_row=True).items()}


def rows_of_tables(rows: Mapping[str, Tensor], params: Iterable[Tensor]) -> Tensor:
    """The mask again, from that of each table; rows that were not there when it was saved may change.

    Raises ValueError if none of the parameters has one of the tables, or a table has fewer rows than its mask.
    """
    for param in params:
        row_range = row_range_of(param)
        if row_range is not None and not rows.keys().isdisjoint(row_range.names):
            break
    else:
        raise ValueError(
            f"rows: the masks are for the tables {quoted(rows)}, and the group has none of these"
        )
    whole = torch.ones(row_range.num_rows, dtype=torch.bool, device=param.device)
    for name, part in row_range.views(whole, per_row=True).items():
        mask = rows.get(name)
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.dim() != 1 or len(mask) > len(part):
            raise ValueError(
                f"rows: table {name!r} needs a bool mask of shape [{len(part)}], with at most that many rows, but got "
                f"{mask.dtype} of shape {list(mask.shape)}"
            )
        part[: len(mask)].copy_(mask)
    return whole
