"""What the row-wise optimizers share: torch's Optimizer on one side, `Backend.row_update_` on the other."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, pairwise
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import backends
from ..dtypes import FLOATS, accumulation
from ..row_update import (
    STATE,
    RowUpdate,
    StateLayout,
    Stream,
)
from ..tables.gradient import TableGradient
from ..tables.layout import quoted
from ..tables.parameter import TableSlice, gradient_of, num_rows_of, parent_of, row_range_of
from .saved_state import (
    as_saved,
    flattened,
    kind_of,
    of_rank,
    of_tables,
    put_together,
    rows_of_tables,
    saved_rows,
    sharding_of,
    shared_state,
    step_number,
)

# The hyperparameters that are True or False, and those that are not negative, with torch's words for them.
FLAGS = ("maximize", "stochastic_rounding", "nesterov")
NOT_NEGATIVE = {
    "lr_decay": "lr_decay value",
    "initial_accumulator_value": "initial_accumulator_value value",
    "eps": "epsilon value",
    "momentum": "momentum value",
    "weight_decay": "weight_decay value",
    "decay_touched_rows": "decay_touched_rows value",
}
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Base of the optimizers of this package: `torch.optim.Optimizer`s for tables with sparse gradients.

    A step reads the gradient as `sparse=True` left it (uncoalesced, or coalesced, or several backwards' put
    together; or a `TableGradient`), sums the entries of each row in fp32 (fp64 for fp64 tables), and updates that
    row and its state in place, once. A row without an entry is neither read nor written, so a step's cost and
    memory grow with the ids of the batch and not with the table; only the state, made at the first step, is as
    tall as the table. Nothing waits for the GPU. An entry of zeros counts as an entry, as for
    torch.optim.SparseAdam.

    All arithmetic and all state are fp32 (fp64 for fp64 tables), also for 16-bit tables, whose rows are rounded
    as they are stored.

    Args:
        params: tables `[num_embeddings, embedding_dim]` (fp32, fp64, fp16, bf16), with or without names, or
            param groups. The weight of a batched layer is one table, whose rows are those of all, one under
            another; `parameters_of` takes it apart. Beside its hyperparameters a group may set any argument below.
        maximize: ascend instead.
        stochastic_rounding: store 16-bit tables rounded up or down at random, with the probabilities that make
            the mean right. To nearest, a step of less than half of the last bit is lost each time. Wider tables
            are stored as computed.
        seed: of that randomness: two runs with one seed round alike, on any backend. None: drawn from torch's
            default generator at the first step.
        rows: the rows that may change: a bool mask `[num_embeddings]`, or ids, the same for each table of the
            group; None: all. The others keep weight and state, whatever their gradient.

    `lr` is a float, or a tensor of one element: on the table's device it is read there, by the kernel, so a
    CUDA graph follows its changes; on the CPU it is read at the step.

    `torch.nn.utils.clip_grad_norm_` does not take sparse gradients; `gpu_embed.optim.clip_grad_norm_` does.

    Raises:
        TypeError: params that are a module, or a hyperparameter that is no number.
        ValueError: a hyperparameter out of range, in torch's words; no parameter; one that is no table, by its
            position, name and shape; rows that do not fit it.
        RuntimeError: at the step, for a dense gradient; but one of zeros, with an lr of 0, makes the state and
            does no more, as `torch.distributed.checkpoint` needs it.
    """

    formula: str  # a key of row_update.STATE; the one with most state, where a group chooses
    # What torch's optimizer of that formula can do and ours cannot, and the number that stands for not doing it.
    torch_only: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._check_numbers(defaults)
        given: Any = params
        if not isinstance(params, torch.nn.Module | Tensor | Mapping):
            given = list(params)
            if not given:
                raise ValueError(
                    f"{type(self).__name__} got an empty parameter list. One table of a batched layer has no "
                    "parameters() of its own: give layer.parameters(), or layer.parameters_of(name)"
                )
        else:
            _check_given(type(self).__name__, [params])
        super().__init__(given, defaults)

    @abstractmethod
    def _row_update(self, group: dict[str, Any], lr: float, step: int) -> RowUpdate:
        """The numbers of a step, the first of which is step 1."""

    def _initial_state(self, group: dict[str, Any]) -> float:
        """What every element of the state begins with."""
        return 0.0

    def _formula(self, group: dict[str, Any]) -> str:
        """By which formula a group's tables are updated."""
        return self.formula

    def _begun(self, update: RowUpdate) -> RowUpdate:
        """The numbers of the step that makes a table's state."""
        return update

    def _depends_on_step(self, group: dict[str, Any]) -> bool:
        """Whether another step has other numbers, so that a CUDA graph must not replay this one."""
        return bool(group["stochastic_rounding"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every table that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                grad = gradient_of(param)
                if grad is not None:
                    self._update(group, param, grad)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all tables; those of `TableSlice`s are their parent's."""
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param, TableSlice):
                    param.grad = None
        super().zero_grad(set_to_none)

    def _update(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, finite: Tensor | None = None
    ) -> None:
        """Apply one gradient to one table, or to those of its rows that the parameter is.

        finite: bool [], on the device; where False, no row and no state changes.
        """
        name = type(self).__name__
        if not grad.is_sparse and not isinstance(grad, TableGradient):
            if _changes_nothing(group["lr"], grad):
                self._state_of(group, param, STATE[self._formula(group)])
                return
            raise RuntimeError(
                f"{name} does not support dense gradients, please make the table with sparse=True, "
                f"or leave out {self._described(param)}, or consider an optimizer of torch.optim instead"
            )
        if grad.is_sparse and grad.sparse_dim() != 1:
            raise RuntimeError(
                f"{name} expects the gradient of a table to be sparse in its rows alone, but it has "
                f"{grad.sparse_dim()} sparse dimensions"
            )
        if (
            param.is_cuda
            and torch.cuda.is_current_stream_capturing()
            and self._depends_on_step(group)
        ):
            raise RuntimeError(
                f"{name}: a CUDA graph would repeat the step that it captured, but each step "
                "here computes with its own number or seed"
            )
        row_range = row_range_of(param)
        if isinstance(grad, TableGradient) and row_range is None:
            raise RuntimeError(
                f"{name}: a parameter was copied without its layer; copy both at once, as in "
                "copy.deepcopy((layer, optimizer))"
            )
        layouts = STATE[self._formula(group)]
        kept = self.state.get(param, {})
        # A step that was dropped has made the state too, and has left its number at 0.
        missing = [layout for layout in layouts if layout.name not in kept]
        begins = bool(missing) or not kept.get("step")
        state = self._state_of(group, param, layouts)
        state["step"] += 1
        if param.numel() == 0:
            return
        try:
            backend = backends.select(param.device)
            update = self._settings(group, state["step"], param)
            if begins:
                update = self._begun(update)
            tensors = tuple([state[layout.name] for layout in layouts])
            rows = group["rows"]
            rows = None if rows is None else rows.to(param.device)
            if isinstance(grad, TableGradient):
                assert row_range is not None
                # Rows of other tables are then out of range, and take no part.
                entries = grad.entries.within(row_range)
                if finite is not None:
                    entries = entries._replace(rows=torch.where(finite, entries.rows, -1))
                if entries.rows.numel():
                    backend.table_row_update_(update, param, tensors, entries, rows)
            elif grad._nnz():
                ids = grad._indices()[0]
                if row_range is not None and row_range.first_row:
                    # As for the tables' entries.
                    ids = ids - row_range.first_row
                if finite is not None:
                    ids = torch.where(finite, ids, -1)
                backend.row_update_(update, param, tensors, ids, grad._values(), rows)
        except Exception:
            # A step that a backend refused has not been made.
            state["step"] -= 1
            raise
        # The kernels write behind autograd's back.
        torch.autograd.graph.increment_version(parent_of(param))

    def _state_of(
        self, group: dict[str, Any], param: Tensor, layouts: tuple[StateLayout, ...]
    ) -> dict[str, Any]:
        """The table's state, made if there is none, and brought to where the table is now."""
        if isinstance(param, TableSlice):
            param.rebind()
        state: dict[str, Any] = self.state[param]
        dtype, num_rows = accumulation(param.dtype), num_rows_of(param)
        # Older SGDs of torch saved a state without steps.
        state.setdefault("step", 0)
        for layout in layouts:
            shape = layout.shape(param, num_rows)
            if layout.name not in state:
                state[layout.name] = torch.full(
                    shape,
                    self._initial_state(group),
                    dtype=dtype,
                    device=param.device,
                )
            value = state[layout.name]
            if value.shape != shape:
                raise RuntimeError(
                    f"{type(self).__name__}: the table is of shape {list(param.shape)} now, but its state "
                    f"{layout.name} was made for another, {list(value.shape)}"
                )
            # The kernels rely on both.
            if value.dtype != dtype or value.device != param.device:
                state[layout.name] = value.to(param.device, dtype)
        return state

    def _seed_of(self, group: dict[str, Any], param: Tensor) -> int:
        """Each table has a stream of its own."""
        if group["seed"] is None:
            # Always of the CPU's generator; the default device may hold no data.
            group["seed"] = int(torch.randint(2**62, (), device="cpu"))
        number = next(i for i, other in enumerate(self._params()) if other is param)
        return int(group["seed"]) + number

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _settings(self, group: dict[str, Any], step: int, param: Tensor) -> RowUpdate:
        lr = group["lr"]
        read_on_device = isinstance(lr, Tensor) and lr.device == param.device
        update = self._row_update(group, 1.0 if read_on_device else float(lr), step)
        is_random = group["stochastic_rounding"]
        return update._replace(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=lr.to(torch.float64).reshape(1) if read_on_device else None,
            stream=Stream(self._seed_of(group, param), step) if is_random else None,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables, with hyperparameters of their own if wanted.

        Raises TypeError and ValueError as the constructor does, and then adds nothing.
        """
        params = param_group.get("params") if isinstance(param_group, dict) else None
        # torch refuses a set, and what is no group.
        if params is not None and not isinstance(params, set):
            one = isinstance(params, torch.nn.Module | Tensor)
            params = param_group["params"] = [params] if one else list(params)
            _check_given(type(self).__name__, params)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                self._check_table(param)
            _check_disjoint(self._params())
            self._check_numbers(group)
            group["rows"] = _row_mask(group["rows"], group["params"])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_numbers(self, group: Mapping[str, Any]) -> None:
        """Raise TypeError for a hyperparameter of a group that is no number, ValueError for one out of range."""
        check_lr(group["lr"])
        for name in FLAGS:
            if not isinstance(group.get(name, False), bool):
                raise TypeError(f"Invalid {name}: {group[name]!r}, expected True or False")
        for name, words in NOT_NEGATIVE.items():
            if name in group:
                check_not_negative(words, group[name])
        if "betas" in group:
            check_betas(group["betas"])
        seed = group["seed"]
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"Invalid seed: {seed!r}, expected an int or None")
        if seed is not None and not 0 <= int(seed) < 2**62:
            raise ValueError(f"Invalid seed: {seed}")

    def _check_table(self, param: Tensor) -> None:
        is_table = param.dim() == 2 or row_range_of(param) is not None
        if not is_table or param.layout is not torch.strided or param.dtype not in FLOATS:
            raise ValueError(
                f"{type(self).__name__} updates dense tables [num_embeddings, embedding_dim] of float32, float64, "
                f"float16 or bfloat16, but {self._described(param)} is {param.dtype}, {param.layout}. Give it the "
                "tables only: the parameters() of layers with sparse=True, or apply_in_backward(model, ...), which "
                "finds them"
            )

    def _described(self, param: Tensor) -> str:
        """A parameter by its position, its name if there is one, and its shape."""
        groups = self.param_groups
        names = [*chain.from_iterable(group.get("param_names", ()) for group in groups)]
        number = next(i for i, other in enumerate(self._params()) if other is param)
        name = f" ({names[number]!r})" if names else ""
        return f"parameter {number}{name} of shape {list(param.shape)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        present = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        # Updates in backward hold the groups, and must follow what is loaded.
        for number, group in enumerate(present):
            loaded, self.param_groups[number] = self.param_groups[number], group
            group.clear()
            group.update(loaded)
        for group in self.param_groups:
            # The state_dict of torch's optimizer knows less.
            for name, value in self.defaults.items():
                # torch adds it to the defaults here: what was loaded would be saved with a setting more.
                if name != "differentiable":
                    group.setdefault(name, value)
            # A copy's masks are cut to this rank's rows, and those of a state_dict are the whole table's.
            if present or any(sharding_of(param) is None for param in group["params"]):
                group["rows"] = _row_mask(group["rows"], group["params"])

    def state_dict(self) -> dict[str, Any]:
        """torch's, which torch's optimizer of the same formula can load, too, for tables of their own.

        The state of a batched layer has a tensor for each table, named after it: "sum.user", "exp_avg.user", of shape
        [num_embeddings] or [num_embeddings, embedding_dim]. Like torch's, it is the optimizer's memory, no copy. The
        state of a `distributed.ShardedEmbedding` is the whole table's, as DTensors.
        """
        # Every later hook must find it as it is saved.
        hook = self.register_state_dict_post_hook(
            lambda _, saved: self._finish_saved(saved), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _finish_saved(self, saved: dict[str, Any]) -> None:
        for packed, group in zip(saved["param_groups"], self.param_groups, strict=True):
            for name, value in self.torch_only.items():
                packed.setdefault(name, value)
            if packed["rows"] is not None and group["params"]:
                packed["rows"] = saved_rows(packed["rows"], group["params"][0])
            for key, param in zip(packed["params"], group["params"], strict=True):
                if key in saved["state"]:
                    saved["state"][key] = as_saved(saved["state"][key], STATE[self.formula], param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimizer of this class, or of torch's optimizer of the same formula.

        The state goes to each table's device, in the dtype that this class keeps. That of a batched layer is found by
        the names of the tables, whatever their order. A table that none was saved for, and rows by which one has
        grown, begin with the state of a first step; a table that the optimizer no longer has is named in a warning.

        In a batched layer the steps, too, go with the tables. Chosen `rows` stay the same rows of the same tables, and
        the rows of an added table may all change.

        Raises TypeError for what is no dict. Raises ValueError for a dict that no optimizer has saved, for the state
        of another optimizer, of tables of other shapes (in a batched layer: of fewer rows, or of another
        embedding_dim), for tables of different steps that are one parameter now, or for a torch optimizer that did
        what this one cannot, such as amsgrad. Nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(self._not_a_state(f"a {type(state_dict).__name__}"))
        # torch would round the state to the table's dtype. What it is about to load is known to the last hook
        # before it, and every later hook must find it as it is to be.
        loaded: dict[Tensor, dict[str, Any]] = {}
        left_out: list[str] = []

        def prepare(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any] | None:
            self._check_is_state(final)
            lengths = [
                [len(group["params"]) for group in groups]
                for groups in (final["param_groups"], self.param_groups)
            ]
            if lengths[0] != lengths[1]:
                # torch refuses it.
                return None
            states = self._saved_states(final)
            self._check_fits(final["param_groups"], states)
            loaded.update(self._states_to_load(final["param_groups"], states, left_out))
            self._check_settings(final["param_groups"])
            others = dict(final["state"])
            for key in chain.from_iterable(group["params"] for group in final["param_groups"]):
                others.pop(key, None)
            return {**final, "state": others}

        hooks = (
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(
                lambda _: self.state.update(loaded), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        if left_out:
            warnings.warn(
                f"{type(self).__name__}: the state to be loaded has tables that are none of this optimizer's, and "
                f"are left out: {quoted(left_out)}",
                stacklevel=2,
            )

    def _not_a_state(self, got: str) -> str:
        return (
            f"{type(self).__name__}.load_state_dict takes what an optimizer's state_dict() returns, a dict with "
            f"'state' and 'param_groups', but got {got}"
        )

    def _check_is_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError for a dict that no optimizer has saved, such as a model's."""
        state, groups = (state_dict.get(key) for key in ("state", "param_groups"))
        if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
            found = quoted(map(str, state_dict), most=4)
            raise ValueError(self._not_a_state(f"one with {found}" if found else "an empty one"))
        for number, group in enumerate(groups):
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
                raise ValueError(
                    self._not_a_state(f"one whose group {number} has no list 'params'")
                )

    def _check_settings(self, saved_groups: list[dict[str, Any]]) -> None:
        """Raise ValueError for the settings of an optimizer of another kind."""
        # Every optimizer of a formula has saved these, torch's too; the others came with time.
        marks = {"betas", "eps", "lr_decay", "initial_accumulator_value"}
        needed = sorted(marks & self.defaults.keys())
        for number, saved in enumerate(saved_groups):
            found = sorted(marks & saved.keys())
            if found != needed:
                raise ValueError(
                    f"{type(self).__name__} has the settings {['lr', *needed]}, but group {number} of the state to be "
                    f"loaded has {['lr', *found]}: another optimizer has saved it"
                )

    def _saved_states(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """What was saved for each parameter."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        states: dict[Tensor, dict[str, Any]] = {}
        for key, param in zip(keys, self._params(), strict=True):
            state = flattened(state_dict["state"].get(key) or {})
            states[param] = {name: of_rank(value, param) for name, value in state.items()}
        return states

    def _check_fits(
        self, saved_groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]
    ) -> None:
        """Raise ValueError for what was saved by an optimizer that did other things, TypeError for no number."""
        name = type(self).__name__
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for option, neutral in self.torch_only.items():
                if saved.get(option, neutral) != neutral:
                    raise ValueError(
                        f"{name} has no {option}, but the state to be loaded was made with "
                        f"{option}={saved[option]}"
                    )
            _row_mask(saved.get("rows"), group["params"])
        foreign = {layout.name for other in STATE.values() for layout in other}
        foreign -= {layout.name for layout in STATE[self.formula]}
        for state in states.values():
            for other in sorted(foreign & {kind_of(key) for key in state}):
                raise ValueError(f"{name} has no state {other}, but the state to be loaded has it")
        for saved in saved_groups:
            self._check_numbers({**self.defaults, **saved})

    def _states_to_load(
        self,
        saved_groups: list[dict[str, Any]],
        states: dict[Tensor, dict[str, Any]],
        left_out: list[str],
    ) -> dict[Tensor, dict[str, Any]]:
        """The state that each parameter gets; names of tables that get none go to left_out."""
        layouts = STATE[self.formula]
        initial = {
            param: self._initial_state({**self.defaults, **saved})
            for saved, group in zip(saved_groups, self.param_groups, strict=True)
            for param in group["params"]
        }
        # The tables of a layer may have become parameters in another order.
        layers: dict[Tensor, list[Tensor]] = {}
        for param in states:
            layers.setdefault(parent_of(param), []).append(param)
        loaded: dict[Tensor, dict[str, Any]] = {}
        for params in layers.values():
            tables = of_tables((states[param] for param in params), layouts)
            for param in params:
                if isinstance(param, TableSlice):
                    # The state gets the dtype and device of the table as it is now.
                    param.rebind()
                if not states[param] and not any(tables.values()):
                    continue
                own = shared_state(param, states[param], (states[other] for other in params))
                loaded[param] = {
                    key: step_number(value) if key == "step" else _moved(value, param)
                    for key, value in own.items()
                    if kind_of(key) not in tables
                }
                for layout in layouts:
                    value = states[param].get(layout.name)
                    if value is None:
                        present = self.state.get(param, {}).get(layout.name)
                        value = put_together(param, layout, tables, initial[param], present)
                    self._check_shape(value, layout, param)
                    loaded[param][layout.name] = _moved(value, param)
            ranges = [row_range_of(param) for param in params]
            found = {name for row_range in ranges if row_range for name in row_range.names}
            saved = dict.fromkeys(name for parts in tables.values() for name in parts)
            left_out += [name for name in saved if ranges[0] and name not in found]
        return loaded

    def _check_shape(self, value: Any, layout: StateLayout, param: Tensor) -> None:
        shape = list(value.shape) if isinstance(value, Tensor) else None
        needed = list(layout.shape(param, num_rows_of(param)))
        if shape != needed:
            raise ValueError(
                f"{type(self).__name__} needs a state {layout.name} of shape {needed}, but the "
                f"state to be loaded has {'none' if shape is None else shape}"
            )


def _moved(value: Any, param: Tensor) -> Any:
    """A tensor of state where the kernels of a table want it."""
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device, accumulation(param.dtype)).contiguous()


def _changes_nothing(lr: float | Tensor, grad: Tensor) -> bool:
    """Whether a step by a gradient that is not sparse is one of zeros, with an lr of 0."""
    return grad.layout is torch.strided and float(lr) == 0 and not grad.any()


def check_lr(lr: object) -> None:
    """Raise TypeError or ValueError, the latter in torch's words, for an lr that no optimizer takes."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    check_not_negative("learning rate", lr)


def check_number(name: str, value: object) -> None:
    """Raise TypeError for what is neither a real number nor a tensor of one; a bool is none."""
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and value.dtype is not torch.bool and not value.is_complex()
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"Invalid {name}: {value!r}, expected a number")


def check_not_negative(name: str, value: Any) -> None:
    """Raise TypeError for what is no number, ValueError for one below 0."""
    check_number(name, value)
    # Written so that NaN raises.
    if not value >= 0.0:
        raise ValueError(f"Invalid {name}: {value}")


def check_betas(betas: Any) -> None:
    """Raise TypeError for what is not two numbers, ValueError, in torch's words, for one out of range."""
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise TypeError(f"Invalid betas: {betas!r}, expected two numbers, such as (0.9, 0.999)")
    for index, beta in enumerate(betas):
        check_number(f"beta parameter at index {index}", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def _check_given(name: str, params: Iterable[Any]) -> None:
    """Raise TypeError for a module, ValueError for a view of a parameter, which never gets a gradient."""
    for entry in params:
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if isinstance(param, torch.nn.Module):
            raise TypeError(
                f"{name} takes parameters, but got a module, {type(param).__name__}: give it layer.parameters(); of a "
                "batched layer, layer.parameters_of(name) are those of some tables"
            )
        if not isinstance(param, Tensor):
            continue
        is_view = param._is_view() and isinstance(param._base, torch.nn.Parameter)
        if is_view or not (param.is_leaf or param.retains_grad):
            raise ValueError(
                f"{name} can't optimize a non-leaf Tensor, or a view of a parameter, such as layer['user'], here of "
                f"shape {list(param.shape)}: give it layer.parameters(), or layer.parameters_of('user')"
            )


def _check_disjoint(params: Iterable[Tensor]) -> None:
    """Raise ValueError for a `TableSlice` whose rows another parameter has too."""
    ranges: dict[Tensor, list[tuple[int, int]]] = {}
    for param in params:
        row_range = row_range_of(param)
        first = 0 if row_range is None else row_range.first_row
        ranges.setdefault(parent_of(param), []).append((first, first + num_rows_of(param)))
    for taken in ranges.values():
        if any(end > begin for (_, end), (begin, _) in pairwise(sorted(taken))):
            raise ValueError("some rows appear in more than one parameter")


def _row_mask(rows: Any, params: list[Tensor]) -> Tensor | None:
    """rows as bool [num_embeddings], on the first table's device; of a sharded table, this rank's part of that."""
    if rows is None or not params:
        return None
    shardings = [sharding_of(param) for param in params]
    heights = [
        num_rows_of(param) if sharding is None else sharding.num_embeddings
        for param, sharding in zip(params, shardings, strict=True)
    ]
    if any(
        getattr(sharding, "own_rows", None) != getattr(shardings[0], "own_rows", None)
        for sharding in shardings
    ):
        raise ValueError(
            "rows: the tables of the group have other rows on a rank; give each a group of its own"
        )
    num_embeddings = heights[0]
    if any(height != num_embeddings for height in heights):
        raise ValueError(f"rows: the tables of the group have {heights} rows, which must be equal")
    if isinstance(rows, Mapping):
        rows = rows_of_tables(rows, params)
    try:
        rows = torch.as_tensor(rows, device=params[0].device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"rows: expected a bool mask or integer ids, got {rows!r}") from error
    if rows.dtype == torch.bool:
        if rows.shape != (num_embeddings,):
            raise ValueError(
                f"rows: the mask must be of shape [{num_embeddings}], got {list(rows.shape)}"
            )
        return of_rank(rows, params[0]).contiguous()
    ids = rows.flatten()
    if ids.numel() == 0:
        ids = ids.to(torch.int64)
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"rows: expected a bool mask or integer ids, got {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_embeddings:
        raise ValueError(
            f"rows: ids must be from 0 to {num_embeddings - 1}, got {ids.tolist()[:8]}"
        )
    mask = torch.zeros(num_embeddings, dtype=torch.bool, device=ids.device)
    mask.index_fill_(0, ids.to(torch.int64), True)
    return of_rank(mask, params[0]).contiguous()
