"""More rows for tables of a batched layer, and for what its optimizers keep of them."""

import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..tables.layout import RowRange, TableLayout, Tables, as_int
from ..tables.parameter import TableSlice, num_rows_of, parent_of, row_range_of

if TYPE_CHECKING:
    from .tables import BatchedTables

# The states of torch's optimizers and ours that can grow, and what they begin with: 0, or what a setting of the group
# says. Others, such as averages of the rows themselves, begin with nobody knows what.
_FIRST_VALUES: dict[str, str] = {
    "exp_avg": "",
    "exp_avg_sq": "",
    "max_exp_avg_sq": "",
    "exp_inf": "",
    "momentum_buffer": "",
    "square_avg": "",
    "grad_avg": "",
    "acc_delta": "",
    "variance": "",
    "prev": "",
    "sum": "initial_accumulator_value",
    "step_size": "lr",
}
_ANEW = "make it anew afterwards, and delete the present one before"


class _Write(NamedTuple):
    """An entry of an optimizer's state or group, made and not yet put there."""

    into: Any
    key: str
    value: Tensor


# Not traced: a compiled function calls it between two graphs.
@torch._disable_dynamo
def grow(layer: "BatchedTables", more: Mapping[str, Any]) -> None:
    """`BatchedTables.grow`: all that is new is made first, so that an error leaves everything as it was."""
    extra = {
        layer._number(name): as_int(f"grow: rows of table {name!r}", rows)
        for name, rows in more.items()
    }
    for number, rows in extra.items():
        if rows < 0:
            raise ValueError(
                f"grow: table {layer.layout.names[number]!r} cannot grow by {rows} rows: tables do not shrink"
            )
    if not any(extra.values()):
        return
    weight = _growable(layer)
    old = layer.layout
    rows_of = [rows + extra.get(number, 0) for number, rows in enumerate(old.num_embeddings)]
    layout = replace(old, num_embeddings=tuple(rows_of))
    # Memory of the kind that the parameter was made of, whatever mode is on.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        tables = Tables.of(layout, weight.device, layer._frozen)
        whole = layout.row_range(0, layout.num_tables)
        buffer = _grown(weight.detach(), old.row_range(0, old.num_tables), whole)
        for number, rows in extra.items():
            if rows:
                layer._fill(number, layout.view(buffer, number)[-rows:])
        found = _followers(layer, weight, whole)
        if isinstance(found, RuntimeError):
            # What nobody uses any more is no hindrance.
            del found
            gc.collect()
            found = _followers(layer, weight, whole)
            if isinstance(found, RuntimeError):
                raise found
        slices, writes = found
        former = [write._replace(value=write.into[write.key]) for write in writes]
        present = weight.data, old, layer.tables
        refusal = None
        try:
            refusal = _refuse_graphs(layer, weight)
            _put(layer, weight, buffer, layout, tables, writes, slices)
        except BaseException:
            # Ctrl-C, for one.
            _put(layer, weight, *present, former, slices)
            if refusal is not None:
                refusal.remove()
            raise


def _put(
    layer: "BatchedTables",
    weight: torch.nn.Parameter,
    buffer: Tensor,
    layout: TableLayout,
    tables: Tables,
    writes: Iterable[_Write],
    slices: Iterable[TableSlice],
) -> None:
    """Give the layer, and what follows it, other memory."""
    # Of another dtype in between: so torch drops the node that expects gradients of the former shape.
    other = torch.float32 if buffer.dtype == torch.float64 else torch.float64
    weight.data = buffer.new_empty(0, dtype=other)
    weight.data = buffer
    if not weight.is_inference():
        # Graphs of before must not read it.
        torch.autograd.graph.increment_version(weight)
    layer._take_layout(layout, tables)
    for write in writes:
        write.into[write.key] = write.value
    for param in slices:
        param.rebind()


def _refuse_graphs(layer: "BatchedTables", weight: torch.nn.Parameter) -> Any:
    """Let graphs of before raise where they come to the parameter; the handle that takes this back, or None."""
    if not weight.requires_grad or weight.is_inference():
        return None
    name = type(layer).__name__

    def refuse(_: Any) -> None:
        raise RuntimeError(
            f"{name}: this gradient was computed before the tables have grown; look up anew after grow(), and call "
            "backward on that"
        )

    with torch.enable_grad():
        view = weight.view_as(weight)
    assert view.grad_fn is not None
    accumulates = view.grad_fn.next_functions[0][0]
    assert accumulates is not None
    return accumulates.register_prehook(refuse)


def _growable(layer: "BatchedTables") -> torch.nn.Parameter:
    """The parameter that is to grow; RuntimeError where others rely on its size."""
    name = f"{type(layer).__name__}.grow"
    weight = layer._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            f"{name}: the tables are no parameter but computed, by a parametrization, by pruning or by FSDP; grow them "
            "before"
        )
    if any(kind.__name__ == "DTensor" for kind in type(weight).__mro__):
        raise RuntimeError(
            f"{name}: the parameter is sharded; grow the tables before fully_shard, or keep this layer out of it "
            "(fully_shard(..., ignored_params=...))"
        )
    if layer._replaced:
        raise RuntimeError(
            f"{name}: some tables look up in other rows, as under torch.func.functional_call or while a checkpoint is "
            "read into a meta layer; grow them afterwards"
        )
    if weight.grad is not None:
        raise RuntimeError(
            f"{name}: .grad has a gradient of the smaller tables; let the optimizer step, and call "
            "zero_grad(set_to_none=True) first"
        )
    if hasattr(weight, "_in_backward_optimizers"):
        raise RuntimeError(
            f"{name}: torch's _apply_optimizer_in_backward hooks into a node of autograd that is replaced as the "
            "parameter grows, and would train it no more; take gpu_embed.optim.apply_in_backward, or grow before"
        )
    for hook in (weight._backward_hooks or {}).values():
        if getattr(getattr(hook, "__self__", None), "held", None):
            raise RuntimeError(
                f"{name}: apply_in_backward holds gradients of the smaller tables, of micro_steps; call finish() or "
                "discard() of what it returned first"
            )
    if weight.device.type == "cpu" and weight.is_shared():
        raise RuntimeError(
            f"{name}: the tables lie in memory that is shared with other processes, which would go on with the "
            "smaller ones; grow them before share_memory()"
        )
    return weight


def _followers(
    layer: "BatchedTables", weight: torch.nn.Parameter, whole: RowRange
) -> tuple[list[TableSlice], list[_Write]] | RuntimeError:
    """What optimizers have of tables that grow to `whole`: the parts of the parameter, and their state anew.

    RuntimeError, returned: a module relies on the size, or an optimizer's state cannot grow. Raised, it would keep the
    objects it is about.
    """
    name = f"{type(layer).__name__}.grow"
    slices: list[TableSlice] = []
    writes: list[_Write] = []
    for one in _holders(layer, weight):
        if isinstance(one, torch.nn.parallel.DistributedDataParallel):
            return RuntimeError(
                f"{name}: DistributedDataParallel averages gradients of the smaller tables; delete the wrapper, grow "
                "the tables alike on every rank, and wrap the module anew"
            )
        if isinstance(one, torch.nn.Module):
            return RuntimeError(
                f"{name}: another batched layer has the same parameter, and would take its rows for others; grow the "
                "tables before they are shared"
            )
        slices += [param for _, param in _params_of(one, weight) if isinstance(param, TableSlice)]
        try:
            writes += _writes(one, weight, whole)
        except RuntimeError as error:
            return error.with_traceback(None)
    return slices, writes


def _holders(layer: "BatchedTables", weight: torch.nn.Parameter) -> list[Any]:
    """Optimizers, DistributedDataParallels and other batched layers that have the parameter."""
    ddp = torch.nn.parallel.DistributedDataParallel
    found: list[Any] = []
    # torch keeps no list of them.
    for one in _objects():
        kind = type(one)
        if issubclass(kind, torch.optim.Optimizer):
            try:
                is_holder = any(True for _ in _params_of(one, weight))
            except Exception:
                # Half made, or a wrapper of what is gone: it has no parameters to show.
                is_holder = False
        elif issubclass(kind, ddp):
            params = one.__dict__.get("_module_parameters", ())
            is_holder = any(param is weight for param in params)
        elif issubclass(kind, torch.nn.Module) and one is not layer:
            is_batched = isinstance(one.__dict__.get("layout"), TableLayout)
            is_holder = is_batched and one._parameters.get("weight") is weight
        else:
            continue
        if is_holder:
            found.append(one)
    return found


def _objects() -> list[Any]:
    """All that the garbage collector knows of, what `gc.freeze()` hid from it among them."""
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        if is_frozen:
            gc.freeze()


def _params_of(
    optimizer: torch.optim.Optimizer, weight: Tensor
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Which of an optimizer's parameters are rows of a layer's, with their groups."""
    for group in getattr(optimizer, "param_groups", ()):
        for param in group["params"]:
            if parent_of(param) is weight:
                yield group, param


def _writes(optimizer: torch.optim.Optimizer, weight: Tensor, whole: RowRange) -> Iterator[_Write]:
    """An optimizer's state for tables that have grown to `whole`; new rows begin as at its first step."""
    name = type(optimizer).__name__
    for group, param in _params_of(optimizer, weight):
        old = row_range_of(param)
        assert old is not None
        new = whole.part(old.names)
        if new.num_embeddings == old.num_embeddings:
            continue
        rows = group.get("rows")
        if isinstance(rows, Tensor):
            if len(group["params"]) > 1:
                raise RuntimeError(
                    f"grow: a group of {name} has rows= for {len(group['params'])} parameters, whose rows must stay "
                    "equal in number; give the tables groups of their own"
                )
            yield _Write(group, "rows", _grown(rows, old, new, 1))
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise RuntimeError(
                f"grow: {name} keeps vectors through all of its parameters, which cannot grow; {_ANEW}"
            )
        state = optimizer.state.get(param, {})
        for key, value in state.items():
            is_whole = isinstance(value, Tensor) and value.shape in (
                param.shape,
                (num_rows_of(param),),
            )
            if is_whole and key in _FIRST_VALUES:
                first = group.get(_FIRST_VALUES[key], 0)
                yield _Write(state, key, _grown(value, old, new, first))
                continue
            for part in tree_leaves(value):
                if isinstance(part, Tensor) and part.dim() > 0 and part.shape != (1,):
                    raise RuntimeError(
                        f"grow: {name} keeps a state {key} of shape {list(part.shape)}, and what new rows have of it "
                        f"is not known: it is of those states of torch's optimizers that are a number for each "
                        f"element or row and begin with a constant; {_ANEW}"
                    )


def _grown(values: Tensor, old: RowRange, new: RowRange, first: Any = 0) -> Tensor:
    """A number for each element, or for each row, of tables that have grown; those of new rows are `first`."""
    per_row = values.shape != old.shape
    if values.is_sparse:
        # torch's momentum of sparse gradients.
        ends = torch.tensor([*accumulate(old.num_embeddings)], device=values.device)
        moved = ends.new_tensor([*accumulate(new.num_embeddings)]) - ends
        rows = values._indices()
        shift = torch.cat([moved.new_zeros(1), moved])[torch.bucketize(rows, ends, right=True)]
        return torch.sparse_coo_tensor(
            rows + shift,
            values._values(),
            new.shape,
            device=values.device,
            is_coalesced=values.is_coalesced(),
            check_invariants=False,
        )
    shape = (new.num_rows,) if per_row else new.shape
    with torch.inference_mode(values.is_inference()):
        whole = torch.full(shape, float(first), dtype=values.dtype, device=values.device)
        parts = old.views(values.contiguous(), per_row)
        for view, part in zip(new.views(whole, per_row).values(), parts.values(), strict=True):
            view[: len(part)].copy_(part)
    return whole
