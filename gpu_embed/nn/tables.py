"""Layers that look up many tables in one launch."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..functional import tables as table_functional
from ..tables.gradient import TableGradient
from ..tables.inputs import BatchSizes, TableInput, reorder
from ..tables.layout import TableLayout, Tables, make_layout, per_table, quoted
from ..tables.parameter import TableSlice
from .bag import EmbeddingBag
from .embedding import Embedding
from .growing import grow
from .table_module import OfAllTables, Table, freezable

if TYPE_CHECKING:
    from typing_extensions import Self

# What transformers sets on the parameters that it has read, and on modules that it shall not initialize.
READ_MARK = "_is_hf_initialized"
# How many tables and features `repr` names.
REPR_TABLES = 12
PerTable = Mapping[str, Any] | Sequence[Any]
# Fills rows [n, embedding_dim] in place, as those of torch.nn.init do.
Initializer = Callable[[Tensor], Any]


class BatchedTables(torch.nn.Module, ABC):
    """What both layers are: many tables in one parameter, known to `state_dict` by their names."""

    weight: torch.nn.Parameter
    _module_type: type[torch.nn.Module]  # torch's layer for one of these tables
    # The numbers of tables that are frozen while the parameter is not.
    _frozen: frozenset[int]

    def __init__(
        self,
        layout: TableLayout,
        sparse: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        output_dtype: torch.dtype | None,
        init: PerTable | Initializer | None,
    ) -> None:
        super().__init__()
        if output_dtype is not None and output_dtype not in FLOATS:
            raise TypeError(
                f"{type(self).__name__}: output_dtype must be torch.float32, float16, bfloat16 or float64, got "
                f"{output_dtype!r}"
            )
        self.layout = layout
        self._frozen = frozenset()
        self._init = _initializers(init, layout)
        self.sparse = sparse
        self.output_dtype = output_dtype
        self._tables_on: dict[torch.device, Tables] = {}
        # What a table's place was given in place of its rows, by the table's number.
        self._replaced: dict[int, Tensor] = {}
        # By the table's number: the view of its rows that was given out last, and the one that ends a replacement.
        self._given_out: dict[int, weakref.ref[Tensor]] = {}
        self._put_back: dict[int, weakref.ref[Tensor] | None] = {}
        # While the whole layer is moved or converted.
        self._is_applying = False
        self._set_buffer(torch.zeros(layout.buffer_shape, device=device, dtype=dtype))
        self._add_places()
        self.reset_parameters()

    @classmethod
    def from_modules(
        cls, modules: Mapping[str, torch.nn.Module] | Iterable[torch.nn.Module]
    ) -> "Self":
        """The tables of some of torch's layers for one table each (or ours), copied.

        Args:
            modules: `torch.nn.Embedding`s, or for bags `torch.nn.EmbeddingBag`s; by name (a dict, a
                `ModuleDict`), or in a sequence, for the names "0", "1", ...

        Raises:
            TypeError: a module of another type.
            ValueError: no module; modules that one buffer cannot hold; a module with max_norm or
                scale_grad_by_freq, which the batched layers do not have.
        """
        function = f"{cls.__name__}.from_modules"
        if isinstance(modules, Mapping | torch.nn.ModuleDict):
            named = dict(modules.items())
        else:
            named = {str(number): module for number, module in enumerate(modules)}
        if not named:
            raise ValueError(f"{function}: at least one module is needed")
        for name, module in named.items():
            if not isinstance(module, cls._module_type):
                raise TypeError(
                    f"{function}: expected torch.nn.{cls._module_type.__name__}, but {name!r} is "
                    f"{type(module).__name__}"
                )
            if module.max_norm is not None or module.scale_grad_by_freq:
                raise ValueError(
                    f"{function}: {name!r} has max_norm or scale_grad_by_freq, which the batched layers do "
                    "not have"
                )
        weights = {name: module.get_parameter("weight") for name, module in named.items()}
        kind = {
            what: _one_of_all(
                function, what, (getattr(weight, what) for weight in weights.values())
            )
            for what in ("dtype", "device")
        }
        sparse = _one_of_all(function, "sparse", (module.sparse for module in named.values()))
        # No numbers are drawn on the meta device.
        layer = cls._made_like(named, sparse=sparse, device="meta", dtype=kind["dtype"])
        layer._set_buffer(
            torch.zeros(layer.layout.buffer_shape, dtype=kind["dtype"], device=kind["device"])
        )
        for number, weight in enumerate(weights.values()):
            layer._freeze(number, weight.requires_grad)
        with torch.no_grad():
            for name, weight in weights.items():
                layer[name].copy_(weight)
        return layer

    def to_modules(self) -> torch.nn.ModuleDict:
        """A layer of this package's for each table, by name, with a copy of its rows."""
        modules = torch.nn.ModuleDict()
        for number, (name, rows) in enumerate(self.items()):
            module = self._module(number, rows.detach().clone())
            modules[name] = module.requires_grad_(self._is_trained(number))
        return modules

    @classmethod
    @abstractmethod
    def _made_like(cls, named: dict[str, Any], **arguments: Any) -> "Self":
        """A layer with the tables of these modules, their values not set."""

    @abstractmethod
    def _module(self, number: int, weight: Tensor) -> torch.nn.Module:
        """A layer for one table."""

    def reset_parameters(self) -> None:
        """Draw every table anew, by its `init` or from N(0, 1); its padding row is zero, as in torch's layers."""
        self._check_writable()
        with torch.no_grad():
            # What lies between tables is zero, also after `to_empty`.
            self.weight.zero_()
            for number in range(len(self)):
                self._draw(number)

    def _draw(self, number: int) -> None:
        padding_idx = self.layout.padding_idx[number]
        with torch.no_grad():
            rows = self.layout.view(self.weight, number)
            self._fill(number, rows)
            if padding_idx >= 0:
                rows[padding_idx].fill_(0)

    def _fill(self, number: int, rows: Tensor) -> None:
        """Draw some rows of a table."""
        init = self._init[number]
        if init is None:
            rows.normal_()
            return
        made = init(rows)
        if (
            isinstance(made, Tensor)
            and made.shape == rows.shape
            and not torch._C._is_alias_of(made, rows)  # type: ignore[attr-defined]
        ):
            raise TypeError(
                f"init: the function of table {self.layout.names[number]!r} returned another tensor, and nobody "
                "reads that; let it fill the rows that it is given in place and return them, or nothing, as the "
                "functions of torch.nn.init do"
            )

    def grow(self, tables: str | Mapping[str, int], rows: int | None = None) -> None:
        """Add rows to the end of tables, `grow("user", 1000)`, or of several at once, `grow({"user": 9, "item": 7})`.

        What there is, is kept bit for bit: rows, names, the Parameter object, and with it the optimizers that have it,
        their groups, and what they have for each row: torch's state tensors, those of `gpu_embed.optim`, also of
        `parameters_of(...)` and of `apply_in_backward`, and chosen `rows=`, among which the new ones are. New rows are
        drawn by `init`, and their state begins as at the optimizer's first step. The optimizers are found by Python's
        garbage collector, which takes a moment in a large program.

        For that moment old and new memory are both there. What points to the old one goes on with it: views that were
        given out before, captured CUDA graphs, and `state_dict()`s. A graph of before the growth cannot run backward
        to these tables. Compiled functions are compiled anew. No other thread may use the layer meanwhile. Ctrl-C
        leaves it as it was, or grown.

        Args:
            tables: a name, or how many rows each table gets, by name.
            rows: how many, at least 0, if one name was given.

        Raises, and then changes nothing:
            KeyError: no table has that name.
            TypeError: rows are no int.
            ValueError: they are negative.
            RuntimeError: `.grad` is there, or gradients that `micro_steps` holds; the parameter is sharded, shared
                with other processes, with another batched layer or with a DistributedDataParallel; an optimizer keeps
                something that is no number for each element or row, or begins with no constant, such as a copy of the
                rows; no memory.
        """
        if isinstance(tables, Mapping):
            if rows is not None:
                raise TypeError("grow takes a name and its rows, or a mapping alone")
            grow(self, tables)
        elif isinstance(tables, str):
            grow(self, {tables: rows})
        else:
            raise TypeError(
                f"grow takes the name of a table and its rows, or a mapping from names to rows, got {tables!r}"
            )

    def _take_layout(self, layout: TableLayout, tables: Tables) -> None:
        """Look up by another layout, which the parameter has by now."""
        self.layout = layout
        self._tables_on = {self.weight.device: tables}
        self._given_out.clear()
        self._prepare()

    def _check_writable(self) -> None:
        """Raise RuntimeError where the rows of one table are no view of the parameter."""
        if any(kind.__name__ == "DTensor" for kind in type(self.weight).__mro__):
            raise RuntimeError(
                f"{type(self).__name__}: the parameter is sharded, and its tables cannot be written one by one; draw "
                "or load them before fully_shard, or keep this layer out of it (fully_shard(..., ignored_params=...))"
            )

    def __getitem__(self, name: str) -> Tensor:
        """The rows of one table, `[num_embeddings, embedding_dim]`, in the parameter's memory."""
        return self._own_rows(self._number(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return self.layout.num_tables

    def __contains__(self, name: object) -> bool:
        return name in self.layout.names

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Each table's name and rows."""
        return ((name, self[name]) for name in self)

    def parameters_of(self, *names: str) -> list[TableSlice]:
        """Some of the tables as parameters, for a param group of one of `gpu_embed.optim`'s optimizers.

        Tables that lie side by side are one parameter, for which a step sorts the ids once and launches one
        update. It is `[rows, embedding_dim]`, or `[elements]` for several of different embedding_dims; `rows=` of
        an optimizer counts its rows, through all its tables.

        The tables have one gradient, the layer's. So `zero_grad()` of one optimizer clears it for all: take one
        optimizer with several groups, or let every optimizer step before the first clears.

        Raises:
            KeyError: no table has that name.
            TypeError: a name is no string.
            ValueError: no name; or the layer has no sparse gradients, which alone can be taken apart without a copy.

        Example::

            tables = gpu_embed.TableBatchedEmbedding({"user": (9, 4), "item": (7, 4)}, sparse=True)
            groups = [
                {"params": tables.parameters_of("user"), "lr": 0.1},
                {"params": tables.parameters_of("item"), "lr": 0.02},
            ]
            optimizer = gpu_embed.optim.RowWiseAdagrad(groups)
        """
        if not self.sparse:
            raise ValueError(
                f"parameters_of: a dense gradient cannot be taken apart by tables; make the {type(self).__name__} with "
                "sparse=True, or give an optimizer its parameters()"
            )
        if not names:
            raise ValueError("parameters_of: name at least one table")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"parameters_of takes names one by one, parameters_of('user', 'item'), got {name!r}"
                )
        ranges: list[list[int]] = []
        for number in sorted({self._number(name) for name in names}):
            if ranges and ranges[-1][1] == number:
                ranges[-1][1] = number + 1
            else:
                ranges.append([number, number + 1])
        return [TableSlice(self.weight, self.layout.row_range(*ends)) for ends in ranges]

    @property
    def tables(self) -> Tables:
        """The layout, and what the kernels read of it, on the parameter's device."""
        device = self.weight.device
        found = self._tables_on.get(device)
        if found is None:
            found = Tables.of(self.layout, device, self._frozen)
            # A fake tensor is of no use to later calls.
            if type(found.fields) is Tensor:
                self._tables_on[device] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        place = self.__dict__.get("_modules", {}).get(name)
        if isinstance(place, Table) and name in self.__dict__:
            # A table may be named as what the layer keeps, such as "training".
            self.__dict__[name] = value
            return
        if isinstance(place, Table) and not isinstance(value, Table):
            raise TypeError(
                f"{name!r} is a table of this layer and is not replaced; write to layer[{name!r}], or give "
                f"layer.{name}.weight a tensor, to change its rows"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if isinstance(self._modules.get(name), Table):
            raise TypeError(f"{name!r} is a table of this layer and cannot be removed from it")
        super().__delattr__(name)

    def __repr__(self) -> str:
        # Without the tables' submodules, which would say the same in a line each.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        layout = self.layout
        shapes = zip(layout.names, layout.num_embeddings, layout.embedding_dims, strict=True)
        parts = [f"{name}: ({rows}, {dim})" for name, rows, dim in shapes]
        if len(parts) > REPR_TABLES:
            parts = _shortened(parts)
            rows = f"{sum(layout.num_embeddings):,} rows"
            parts.insert(0, f"{layout.num_tables} tables, {rows}, {self.weight.numel():,} elements")
        if layout.features != layout.names:
            of_features = [
                name if name == layout.names[table] else f"{name}: {layout.names[table]}"
                for name, table in zip(layout.features, layout.feature_tables, strict=True)
            ]
            parts.append(f"features=({', '.join(_shortened(of_features))})")
        if self.sparse:
            parts.append("sparse=True")
        if self.output_dtype is not None:
            parts.append(f"output_dtype={self.output_dtype}")
        if self._frozen:
            frozen = [layout.names[number] for number in sorted(self._frozen)]
            parts.append(f"frozen=({', '.join(_shortened(frozen))})")
        return ", ".join(parts)

    def _number(self, name: str) -> int:
        try:
            return self.layout.names.index(name)
        except ValueError:
            layout, hint = self.layout, ""
            if name in layout.features:
                table = layout.names[layout.feature_tables[layout.features.index(name)]]
                hint = f"; a feature is, which looks up in table {table!r}"
            raise KeyError(
                f"no table is named {name!r}{hint}. The tables are {quoted(layout.names)}"
            ) from None

    def _set_buffer(self, buffer: Tensor) -> None:
        former = self._parameters.get("weight")
        # A table may have that name.
        self._parameters["weight"] = torch.nn.Parameter(
            buffer, former is None or former.requires_grad
        )
        self._prepare()

    def _prepare(self) -> None:
        """Bring up to date what follows from the layout and from the parameter's device."""
        # By this an optimizer knows that a parameter of one dimension is made of rows.
        self.weight.row_range = self.layout.row_range(0, len(self))  # type: ignore[attr-defined]
        self.weight.__dict__.pop("requires_grad_", None)
        if self._frozen:
            self.weight.requires_grad_ = OfAllTables(self)  # type: ignore[method-assign, assignment]
        # Made here and not in a call, which may be compiled or captured in a CUDA graph.
        self.tables  # noqa: B018

    def _add_places(self) -> None:
        """A submodule for each table, through which its state_dict key is a path."""
        for number, name in enumerate(self.layout.names):
            # Not by add_module, which refuses a table named as something that every module has, such as "type".
            self._modules[name] = Table(self, number)

    # What the tables' submodules read and write.

    def _rows(self, number: int) -> Tensor:
        """What a table looks up in."""
        replaced = self._replaced.get(number)
        if replaced is not None:
            return replaced
        if self.weight.is_meta:
            # accelerate makes what it loads of the type that it finds.
            rows: Tensor = torch.nn.Parameter(
                self.layout.view(self.weight, number).detach(), self._is_trained(number)
            )
        else:
            rows = self._own_rows(number)
        if not torch.compiler.is_compiling():
            self._given_out[number] = weakref.ref(rows)
        return rows

    def _own_rows(self, number: int) -> Tensor:
        """A table's part of the parameter."""
        rows = self.layout.view(self.weight, number)
        if number in self._frozen:
            rows = rows.detach()
        return rows if torch.compiler.is_compiling() else freezable(self, number, rows)

    def _is_trained(self, number: int) -> bool:
        return self.weight.requires_grad and number not in self._frozen

    def _freeze(self, number: int, requires_grad: bool) -> None:
        """Whether a table gets a gradient; while none does, the parameter does not."""
        if requires_grad == self._is_trained(number):
            return
        frozen = self._frozen if self.weight.requires_grad else frozenset(range(len(self)))
        frozen = frozen - {number} if requires_grad else frozen | {number}
        trains = len(frozen) < len(self)
        self._set_frozen(frozenset())
        self.weight.requires_grad_(trains)
        self._set_frozen(frozen if trains else frozenset())

    def _set_frozen(self, frozen: frozenset[int]) -> None:
        self._frozen = frozen
        self._tables_on = {
            device: tables.freezing(frozen) for device, tables in self._tables_on.items()
        }
        self._prepare()

    def _replace_rows(self, number: int, value: Any) -> None:
        """Let a table look up in another tensor, until the view that was taken out before is put back."""
        if number in self._replaced:
            own = self._put_back.get(number)
            if value is None or (own is not None and value is own()):
                del self._replaced[number], self._put_back[number]
                return
        self._check_rows(number, value)
        if number not in self._replaced:
            self._put_back[number] = self._given_out.get(number)
        self._replaced[number] = value
        self._settle(number)

    def _assign_rows(self, number: int, value: Tensor) -> None:
        """Give a table other values for good."""
        self._check_rows(number, value)
        if self.weight.is_meta and not value.is_meta:
            if not isinstance(value, torch.nn.Parameter):
                value = torch.nn.Parameter(value.detach(), self.weight.requires_grad)
            self._replaced[number], self._put_back[number] = value, None
            self._settle(number)
            return
        self._check_writable()
        with torch.no_grad():
            self.layout.view(self.weight, number).copy_(value)

    def _settle(self, last: int) -> None:
        """Once a meta layer was given a parameter for each of its tables, they become its own."""
        if not self.weight.is_meta:
            return
        values = [self._replaced.get(number) for number in range(len(self))]
        if all(isinstance(value, torch.nn.Parameter) and not value.is_meta for value in values):
            errors: list[str] = []
            self._take_over([value.detach() for value in values if value is not None], errors)
            if errors:
                del self._replaced[last], self._put_back[last]
                raise RuntimeError(f"{type(self).__name__}: {errors[0]}")
            self._replaced.clear()
            self._put_back.clear()
            # transformers marks what it has read, and gives the other tables memory that nobody has written to.
            unread = [n for n, value in enumerate(values) if not hasattr(value, READ_MARK)]
            if len(unread) < len(values):
                for number in unread:
                    self._draw(number)
                for module in (self, *self._modules.values()):
                    setattr(module, READ_MARK, True)

    def _check_rows(self, number: int, value: Tensor) -> None:
        layout = self.layout
        shape = (layout.num_embeddings[number], layout.embedding_dims[number])
        if value.shape != shape:
            raise ValueError(
                f"table {layout.names[number]!r} has rows of shape {list(shape)}, got {list(value.shape)}"
            )

    def _whole(self) -> Tensor:
        """The buffer that a call looks up in, put together where tables were given other rows."""
        if not self._replaced:
            return self.weight
        layout = self.layout
        rows = [self._rows(number) for number in range(len(self))]
        if layout.is_uniform:
            return torch.cat(rows)
        parts = []
        ends = (*layout.first_elements[1:], *layout.buffer_shape)
        for table, begin, end in zip(rows, layout.first_elements, ends, strict=True):
            parts += [table.reshape(-1), table.new_zeros(end - begin - table.numel())]
        return torch.cat(parts)

    def _apply(self, fn: Any, recurse: bool = True) -> "Self":
        grad = self.weight.grad
        if isinstance(grad, TableGradient):
            self.weight.grad = None
        self._is_applying = True
        try:
            super()._apply(fn, recurse)
        finally:
            self._is_applying = False
        if isinstance(grad, TableGradient):
            # It has no memory of its own, which fn might ask for.
            self.weight.grad = grad.converted(fn)
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The tables' submodules belong to this layer, and numbers of names to this process: a copy makes its own.
        others = {name: one for name, one in self._modules.items() if not isinstance(one, Table)}
        return {**self.__dict__, "_modules": others, "_tables_on": {}, "_given_out": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()
        self._add_places()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """All but the tables, whose submodules save their rows."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._holds_tables():
            del destination[f"{prefix}weight"]

    def _holds_tables(self) -> bool:
        """Whether the buffer is a parameter, and not what a parametrization, or pruning, makes of others."""
        return "weight" in self._parameters

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._check_writable()
        messages = strict, missing_keys, unexpected_keys, error_msgs
        key = f"{prefix}weight"
        if not self._holds_tables():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *messages)
            return
        # The buffer has no key. torch.distributed.checkpoint adds the parameter itself to a full state_dict.
        extra = state_dict.pop(key, self.weight)
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [one for one in missing if one != key]
        if extra is not self.weight:
            state_dict[key] = extra
            if strict:
                unexpected_keys.append(key)
        # torch itself loads each table, into a module of one weight that lies in the buffer.
        loaded = []
        for name, rows in self.items():
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(rows.detach(), self.weight.requires_grad)
            holder._load_from_state_dict(state_dict, f"{prefix}{name}.", local_metadata, *messages)
            loaded.append(holder.weight.detach())
        if error_msgs:
            error_msgs += self._advice(state_dict, prefix)
            return
        if self.weight.is_meta and any(rows.is_meta for rows in loaded):
            # The files of a checkpoint may come one after the other.
            for number, rows in enumerate(loaded):
                if not rows.is_meta:
                    self._assign_rows(number, rows)
        else:
            self._take_over(loaded, error_msgs)

    def _advice(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What makes tables as tall as those to be loaded."""
        more = {}
        for name, rows in self.items():
            saved: Any = state_dict.get(f"{prefix}{name}.weight")
            is_table = isinstance(saved, Tensor) and saved.shape[1:] == rows.shape[1:]
            if is_table and saved.dim() == 2 and len(saved) > len(rows):
                more[name] = len(saved) - len(rows)
        return [f"The tables to be loaded have grown; call grow({more}) first"] if more else []

    def _take_over(self, loaded: list[Tensor], error_msgs: list[str]) -> None:
        """Bring tables that torch has put elsewhere, by assign=True or by swapping, back into one buffer."""
        replaced = [
            rows
            for name, rows in zip(self, loaded, strict=True)
            if rows.data_ptr() != self[name].data_ptr() or rows.device != self.weight.device
        ]
        if not replaced:
            return
        kinds = {(rows.dtype, rows.device) for rows in replaced}
        if len(kinds) > 1:
            error_msgs.append(
                "tables in one buffer have one dtype and device, but those to be loaded have "
                + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            )
            return
        ((dtype, device),) = kinds
        with torch.no_grad():
            buffer = torch.zeros(self.layout.buffer_shape, dtype=dtype, device=device)
            for number, rows in enumerate(loaded):
                self.layout.view(buffer, number).copy_(rows)
        self._set_buffer(buffer)


class TableBatchedEmbedding(BatchedTables):
    """Many tables of one embedding_dim, their rows looked up in one launch, without pooling.

    Input: the ids of all features `[N]`, cut by offsets `[F * B + 1]` into bags, feature-major as FBGEMM's are: bag
    `f * B + b` holds example b's ids of feature f. There is one feature a table, unless `features` says otherwise.
    `gpu_embed.batch_bags` and `gpu_embed.batch_padded` make both, by the features' names. Ids and offsets are
    int64, int32, int16 or uint8. Output: `[N, embedding_dim]`, bit-equal to the tables' rows; ids behind the last
    offset are in no table, and give rows of zeros. Nothing waits for the GPU. `batch_sizes` is as in
    TableBatchedEmbeddingBag.

    Args:
        tables: (num_embeddings, embedding_dim) of each table, by name; or in a sequence, for the names "0",
            "1", ... All embedding_dims must be equal, as rows of different lengths have no common shape.
        padding_idx: the row of a table that gets no gradient: one for all tables, by name, or in a sequence;
            None: none. Negative counts from the end.
        sparse: the gradient is a sparse COO tensor (uncoalesced, one entry an id).
        device, dtype: of all tables; fp64, fp32, fp16 or bf16.
        features: what looks up, by name, and in which table; `{"item": "item", "history": "item"}` lets two
            features share one. In this order come the ids. None: one feature a table, of its name.
        output_dtype: of the rows; fp32, fp16 or bf16 (fp64 for fp64 tables). None: the tables'. Gradients have the
            tables', and are summed from those of the output before they are rounded.
        init: draws a table's rows: a function that is given them, `[n, embedding_dim]`, and fills them in place, as
            those of torch.nn.init do. One for all tables, by name, or in a sequence; None, and tables that have none:
            N(0, 1). The padding row is zero afterwards. `reset_parameters()` and `grow()` call it too, the latter with
            the new rows alone. Pickled with the layer, by its name.

    Attributes:
        weight: the one parameter, `[sum of num_embeddings, embedding_dim]`: the tables, one under another.

    `layer[name]` is a table's rows, in the parameter's memory; iterating gives the names.
    `layer[name].requires_grad_(False)` freezes that table alone: it gets no gradient. `state_dict` holds
    `name.weight` for each table, as a `ModuleDict` of `torch.nn.Embedding` does.

    Raises:
        ValueError: tables of different embedding_dims; names, shapes or offsets that do not fit.
        IndexError: an id is out of its table's range; when, is set by `gpu_embed.set_bounds_check`. The message
            names the table, the bag, the id's place in it, and the table's rows.
        RuntimeError: a wrong dtype or device; offsets on the CPU that do not cut the ids into bags.
        TypeError: an argument is no tensor; a size or a padding_idx is no int.

    Example::

        tables = gpu_embed.TableBatchedEmbedding({"user": (1000, 32), "item": (200, 32)})
        ids = {"user": torch.tensor([[4, 7]]), "item": torch.tensor([[199, 0]])}  # of one example
        rows = tables(*gpu_embed.batch_padded(ids))  # [4, 32]
    """

    _module_type = torch.nn.Embedding

    def __init__(
        self,
        tables: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]],
        padding_idx: int | PerTable | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        features: Mapping[str, str] | None = None,
        output_dtype: torch.dtype | None = None,
        init: PerTable | Initializer | None = None,
    ) -> None:
        layout = make_layout(tables, "sum", padding_idx, features)
        if not layout.is_uniform:
            raise ValueError(
                "TableBatchedEmbedding: rows of tables of different embedding_dims have no common shape, got "
                f"{list(layout.embedding_dims)}; TableBatchedEmbeddingBag takes them"
            )
        super().__init__(layout, sparse, device, dtype, output_dtype, init)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor = None,  # type: ignore[assignment]  # so that a missing one is the check's to explain
        per_sample_weights: None = None,
        features: tuple[str, ...] | int | None = None,
        batch_sizes: BatchSizes | None = None,
    ) -> Tensor:
        if per_sample_weights is not None:
            raise NotImplementedError(
                "TableBatchedEmbedding: per_sample_weights are for bags; use TableBatchedEmbeddingBag"
            )
        tables, own = self.tables, self.layout.features
        order = order_of(type(self).__name__, own, features)
        if batch_sizes is not None:
            offsets = table_functional.pad_batch(
                "table_batched_embedding", input, offsets, batch_sizes, order
            )
        if order != own:
            # Rows follow the ids, so the tables follow the order of the batch.
            tables = tables.in_order([own.index(feature) for feature in order])
        sparse = self.sparse
        if self._replaced:
            # What some were given says itself whether it gets a gradient.
            sparse, tables = False, tables._replace(trained_fields=None)
        return table_functional.table_batched_embedding(
            input, self._whole(), offsets, tables, sparse, self.output_dtype
        )

    @classmethod
    def _made_like(cls, named: dict[str, Any], **arguments: Any) -> "Self":
        return cls(_sizes(named), _paddings(named), **arguments)

    def _module(self, number: int, weight: Tensor) -> torch.nn.Module:
        layout = self.layout
        padding_idx = layout.padding_idx[number]
        return Embedding(
            layout.num_embeddings[number],
            layout.embedding_dims[number],
            None if padding_idx < 0 else padding_idx,
            sparse=self.sparse,
            _weight=weight,
        )


class TableBatchedEmbeddingBag(BatchedTables):
    """Sums, means or maxima of bags of rows of many tables, in one launch.

    Input: the ids of all features `[N]`, cut by offsets `[F * B + 1]` into bags, feature-major as FBGEMM's are: bag
    `f * B + b` is bag b of feature f. There is one feature a table, unless `features` says otherwise.
    `gpu_embed.batch_bags` and `gpu_embed.batch_padded` make both, by the features' names. Ids and
    offsets are int64, int32, int16 or uint8. `per_sample_weights` `[N]`, of the tables' dtype, multiply the
    rows, where all tables have mode "sum". Ids behind the last offset are in no bag. Output:
    `[B, sum of embedding_dims]`, the features side by side; `layer.split(output)` gives each its view.

    Features may have a batch size each: `batch_sizes`, by name or in the order of the ids, says how many bags each has,
    and offsets are `[sum of batch_sizes + 1]`. Then the output has as many rows as the largest, and behind a feature's
    own bags zeros; `layer.split(output, batch_sizes)` leaves these out.

    Args:
        tables: (num_embeddings, embedding_dim) of each table, by name; or in a sequence, for the names "0",
            "1", ... The kernels move as many bytes at a time, 16 at the most, as divide every table's rows.
        mode: "sum", "mean" or "max": one for all tables, by name, or in a sequence. Of equal maxima the first
            gets the gradient, as in EmbeddingBag; where a table has this mode, long bags are not split.
        padding_idx: the row of a table that takes no part in its bags, and gets no gradient: one for all
            tables, by name, or in a sequence; None: none. Negative counts from the end.
        sparse: the gradient has one entry an id, and its cost does not grow with the tables: a sparse COO tensor
            (uncoalesced) for tables of one embedding_dim, else a `gpu_embed.TableGradient`. In a bag whose
            maximum is taken every id has an entry, of zeros where it is not the largest.
        device, dtype: of all tables; fp64, fp32, fp16 or bf16.
        features: what looks up, by name, and in which table; `{"item": "item", "history": "item"}` lets two
            features share one, and their gradients add up. In this order come the ids, and the columns of the
            output. None: one feature a table, of its name.
        output_dtype: of the output; fp32, fp16 or bf16 (fp64 for fp64 tables). None: the tables'. The tables and
            per-sample weights keep theirs. So do their gradients, which are summed in fp32 from the gradient of the
            output, and rounded once; of a sparse gradient each entry is rounded.
        init: as in `TableBatchedEmbedding`.

    Attributes:
        weight: the one parameter. `[sum of num_embeddings, embedding_dim]`, the tables one under another, if
            they have one embedding_dim; else `[elements]`, in which each table begins at a multiple of 8.

    `layer[name]` is a table's rows, in the parameter's memory; iterating gives the names.
    `layer[name].requires_grad_(False)` freezes that table alone: it gets no gradient. `state_dict` holds
    `name.weight` for each table, as a `ModuleDict` of `torch.nn.EmbeddingBag` does. Sums are taken in fp32 (fp64 for
    fp64) and rounded once; an empty bag's is zero.

    Raises:
        ValueError: names, shapes, modes, offsets or batch_sizes that do not fit.
        IndexError, RuntimeError: an id is out of its table's range (an error that is both, as for
            EmbeddingBag); when, is set by `gpu_embed.set_bounds_check`. The message names the table, the bag,
            the id's place in it, and the table's rows.
        RuntimeError: a wrong dtype or device; an output_dtype of fp64 for other tables, or another for fp64 ones;
            offsets on the CPU that do not cut the ids into bags.
        NotImplementedError: per_sample_weights, and a table of mode "mean" or "max".
        TypeError: an argument is no tensor; a size or a padding_idx is no int; output_dtype is no floating dtype.

    Example::

        tables = gpu_embed.TableBatchedEmbeddingBag({"user": (1000, 32), "item": (200, 16)}, mode="mean")
        user = torch.tensor([4, 7, 7]), torch.tensor([0, 1])  # ids and offsets of two bags
        item = torch.tensor([199]), torch.tensor([0, 1])
        means = tables(*gpu_embed.batch_bags({"user": user, "item": item}))  # [2, 48]
    """

    _module_type = torch.nn.EmbeddingBag

    def __init__(
        self,
        tables: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]],
        mode: str | PerTable = "sum",
        padding_idx: int | PerTable | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        features: Mapping[str, str] | None = None,
        output_dtype: torch.dtype | None = None,
        init: PerTable | Initializer | None = None,
    ) -> None:
        layout = make_layout(tables, mode, padding_idx, features)
        super().__init__(layout, sparse, device, dtype, output_dtype, init)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor = None,  # type: ignore[assignment]  # so that a missing one is the check's to explain
        per_sample_weights: Tensor | None = None,
        features: tuple[str, ...] | int | None = None,
        batch_sizes: BatchSizes | None = None,
    ) -> Tensor:
        tables, own = self.tables, self.layout.features
        order = order_of(type(self).__name__, own, features)
        if batch_sizes is not None:
            offsets = table_functional.pad_batch(
                "table_batched_embedding_bag", input, offsets, batch_sizes, order
            )
        if order != own:
            table_functional.check_batch(
                "table_batched_embedding_bag", input, offsets, self.weight, self.layout
            )
            table_functional.check_sample_weights(
                input, per_sample_weights, self.weight, self.layout
            )
            batch = TableInput(input, offsets, per_sample_weights)
            batch = reorder(batch, [order.index(feature) for feature in own])
            input, offsets, per_sample_weights, *_ = batch
        sparse = self.sparse
        if self._replaced:
            # What some were given says itself whether it gets a gradient.
            sparse, tables = False, tables._replace(trained_fields=None)
        return table_functional.table_batched_embedding_bag(
            input,
            self._whole(),
            offsets,
            tables,
            per_sample_weights,
            sparse,
            self.output_dtype,
        )

    def split(self, output: Tensor, batch_sizes: BatchSizes | None = None) -> list[Tensor]:
        """Each feature's columns of an output `[B, sum of embedding_dims]`: views `[B, embedding_dim]`.

        Args:
            batch_sizes: how many bags each feature has, by name or in the layer's order, such as the `batch_sizes` of
                `batch_bags`. So many rows each view has, and not those of zeros behind them. None: all have B.
        """
        dims = self.layout.feature_dims
        if output.dim() != 2 or output.shape[1] != sum(dims):
            raise ValueError(
                f"split: expected an output of this layer, [B, {sum(dims)}], got {list(output.shape)}"
            )
        columns = list(output.split(dims, dim=1))
        if batch_sizes is None:
            return columns
        sizes = table_functional.sizes_in_order("split", batch_sizes, self.layout.features)
        if output.shape[0] != max(sizes):
            raise ValueError(
                f"split: an output of at most {max(sizes)} bags a feature has as many rows, got {list(output.shape)}"
            )
        return [part[:size] for part, size in zip(columns, sizes, strict=True)]

    @classmethod
    def _made_like(cls, named: dict[str, Any], **arguments: Any) -> "Self":
        modes = {name: module.mode for name, module in named.items()}
        return cls(_sizes(named), modes, _paddings(named), **arguments)

    def _module(self, number: int, weight: Tensor) -> torch.nn.Module:
        layout = self.layout
        padding_idx = layout.padding_idx[number]
        return EmbeddingBag(
            layout.num_embeddings[number],
            layout.embedding_dims[number],
            mode=layout.modes[number],
            sparse=self.sparse,
            _weight=weight,
            padding_idx=None if padding_idx < 0 else padding_idx,
        )


def _shortened(parts: list[str]) -> list[str]:
    """The first of many parts of a text, how many are left out, and the last."""
    if len(parts) <= REPR_TABLES:
        return parts
    left_out = len(parts) - REPR_TABLES
    return [*parts[: REPR_TABLES - 1], f"... {left_out} more ...", parts[-1]]


def _initializers(
    init: PerTable | Initializer | None, layout: TableLayout
) -> tuple[Initializer | None, ...]:
    """What draws each table."""
    found = per_table("init", init, layout.names, None)
    for name, one in zip(layout.names, found, strict=True):
        if one is not None and not callable(one):
            raise TypeError(
                f"init: table {name!r} needs a function that fills rows [n, embedding_dim] in place, such as those of "
                f"torch.nn.init, or None, got {one!r}"
            )
    return tuple(found)


def _one_of_all(function: str, what: str, values: Iterable[Any]) -> Any:
    """The value that all tables have."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1:
        raise ValueError(
            f"{function}: the tables of one buffer have one {what}, got {', '.join(map(str, distinct))}"
        )
    return distinct[0]


def _sizes(named: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (one.num_embeddings, one.embedding_dim) for name, one in named.items()}


def _paddings(named: dict[str, Any]) -> dict[str, int | None]:
    return {name: one.padding_idx for name, one in named.items()}


def order_of(
    name: str, own: tuple[str, ...], features: tuple[str, ...] | int | None
) -> tuple[str, ...]:
    """The features of a batch in the order of its ids, checked.

    Args:
        name: the layer's class, for errors.
        own: its features.
    """
    if features is None or features == own:
        return own
    if not isinstance(features, int | tuple | list):
        raise TypeError(
            f"{name}: features are the names in the order of the ids, or their number, got "
            f"{type(features).__name__}"
        )
    if isinstance(features, int):
        if features != len(own):
            raise ValueError(
                f"{name}: the batch has the ids of {features} features, but the layer has {len(own)}: "
                f"{quoted(own)}"
            )
        return own
    missing = [feature for feature in own if feature not in features]
    unknown = [feature for feature in features if feature not in own]
    if missing or unknown or len(features) != len(own):
        parts = [f"it lacks {quoted(missing)}"] if missing else []
        parts += [f"the layer does not know {quoted(unknown)}"] if unknown else []
        raise ValueError(
            f"{name}: the batch does not have the layer's features, {quoted(own)}: "
            f"{' and '.join(parts) or 'it names one twice'}"
        )
    return tuple(features)
