"""Layers that look up many tables in one launch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import table_functional
from .nn import Embedding, EmbeddingBag
from .row_parameter import RowParameter
from .table_gradient import TableGradient
from .tables import TableLayout, Tables, make_layout

if TYPE_CHECKING:
    from typing_extensions import Self

PerTable = Mapping[str, Any] | Sequence[Any]


class BatchedTables(torch.nn.Module, ABC):
    """What both layers are: many tables in one parameter, known to `state_dict` by their names."""

    fields: Tensor
    table_of_column: Tensor
    _module_type: type[torch.nn.Module]  # torch's layer for one of these tables

    def __init__(
        self,
        layout: TableLayout,
        sparse: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.sparse = sparse
        self._set_buffer(torch.zeros(layout.buffer_shape, device=device, dtype=dtype))
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
            for what in ("dtype", "device", "requires_grad")
        }
        sparse = _one_of_all(function, "sparse", (module.sparse for module in named.values()))
        # No numbers are drawn on the meta device.
        layer = cls._made_like(named, sparse=sparse, device="meta", dtype=kind["dtype"])
        layer.weight.requires_grad_(kind["requires_grad"])
        layer._set_buffer(
            torch.zeros(layer.layout.buffer_shape, dtype=kind["dtype"], device=kind["device"])
        )
        with torch.no_grad():
            for name, weight in weights.items():
                layer[name].copy_(weight)
        return layer

    def to_modules(self) -> torch.nn.ModuleDict:
        """A layer of this package's for each table, by name, with a copy of its rows."""
        modules = torch.nn.ModuleDict()
        for number, (name, rows) in enumerate(self.items()):
            module = self._module(number, rows.detach().clone())
            modules[name] = module.requires_grad_(self.weight.requires_grad)
        return modules

    @classmethod
    @abstractmethod
    def _made_like(cls, named: dict[str, Any], **arguments: Any) -> "Self":
        """A layer with the tables of these modules, their values not set."""

    @abstractmethod
    def _module(self, number: int, weight: Tensor) -> torch.nn.Module:
        """A layer for one table."""

    def reset_parameters(self) -> None:
        """Draw every table anew: N(0, 1), its padding row zero, as torch's layers do."""
        with torch.no_grad():
            # What lies between tables is zero, also after `to_empty`.
            self.weight.zero_()
            for number, padding_idx in enumerate(self.layout.padding_idx):
                rows = self.layout.view(self.weight, number)
                rows.normal_()
                if padding_idx >= 0:
                    rows[padding_idx].fill_(0)

    def __getitem__(self, name: str) -> Tensor:
        """The rows of one table, `[num_embeddings, embedding_dim]`, in the parameter's memory."""
        return self.layout.view(self.weight, self._number(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return self.layout.num_tables

    def __contains__(self, name: object) -> bool:
        return name in self.layout.names

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Each table's name and rows."""
        return ((name, self[name]) for name in self)

    def parameters_of(self, *names: str) -> list[RowParameter]:
        """Some of the tables as parameters, for a param group of one of `gpu_embed.optim`'s optimizers.

        Tables that lie side by side are one parameter, for which a step sorts the ids once and launches one
        update. It is `[rows, embedding_dim]`, or `[elements]` for several of different embedding_dims; `rows=` of
        an optimizer counts its rows, through all its tables.

        Raises:
            KeyError: no table has that name.
            ValueError: the layer has no sparse gradients, which alone can be taken apart without a copy.

        Example::

            tables = gpu_embed.TableBatchedEmbedding({"user": (9, 4), "item": (7, 4)}, sparse=True)
            groups = [
                {"params": tables.parameters_of("user"), "lr": 0.1},
                {"params": tables.parameters_of("item"), "lr": 0.02},
            ]
            optimizer = gpu_embed.optim.RowWiseAdagrad(groups)
        """
        if not self.sparse:
            raise ValueError("parameters_of is for layers with sparse=True")
        ranges: list[list[int]] = []
        for number in sorted({self._number(name) for name in names}):
            if ranges and ranges[-1][1] == number:
                ranges[-1][1] = number + 1
            else:
                ranges.append([number, number + 1])
        return [RowParameter(self.weight, self.layout.row_range(*ends)) for ends in ranges]

    @property
    def tables(self) -> Tables:
        return Tables(self.layout, self.fields, self.table_of_column)

    def extra_repr(self) -> str:
        layout = self.layout
        shapes = zip(layout.names, layout.num_embeddings, layout.embedding_dims, strict=True)
        text = ", ".join(f"{name}: ({rows}, {dim})" for name, rows, dim in shapes)
        return text + (", sparse=True" if self.sparse else "")

    def _number(self, name: str) -> int:
        try:
            return self.layout.names.index(name)
        except ValueError:
            raise KeyError(name) from None

    def _set_buffer(self, buffer: Tensor) -> None:
        former = self._parameters.get("weight")
        self.weight = torch.nn.Parameter(buffer, former is None or former.requires_grad)
        self._make_metadata()

    def _make_metadata(self) -> None:
        device = self.weight.device
        # By this an optimizer knows that a parameter of one dimension is made of rows.
        self.weight.row_range = self.layout.row_range(0, len(self))  # type: ignore[attr-defined]
        # Not in state_dict: they follow from the constructor's arguments.
        self.register_buffer("fields", self.layout.fields(device), persistent=False)
        self.register_buffer(
            "table_of_column", self.layout.table_of_column(device), persistent=False
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Self":
        grad = self.weight.grad
        if isinstance(grad, TableGradient):
            self.weight.grad = None
        super()._apply(fn, recurse)
        if isinstance(grad, TableGradient):
            # It has no memory of its own, which fn might ask for.
            self.weight.grad = grad.converted(fn)
        # `to_empty` leaves them undefined.
        self._make_metadata()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Another process numbers the names anew.
        self._make_metadata()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, rows in self.items():
            destination[f"{prefix}{name}.weight"] = rows if keep_vars else rows.detach()

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
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        # torch itself loads each table, into a module of one weight that lies in the buffer.
        loaded = []
        for name, rows in self.items():
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(rows.detach(), self.weight.requires_grad)
            holder._load_from_state_dict(
                state_dict,
                f"{prefix}{name}.",
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            loaded.append(holder.weight.detach())
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key[len(prefix) :].split(".", 1)[0] not in self
            ]
        if not error_msgs:
            self._take_over(loaded, error_msgs)

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
                "tables in one buffer have one dtype and device, but the checkpoint's have "
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

    Input: the ids of all tables `[N]`, cut by offsets `[T * B + 1]` into bags, table-major as FBGEMM's are: bag
    `t * B + b` holds example b's ids for table t. `gpu_embed.batch_bags` and `gpu_embed.batch_padded` make
    both. Ids and offsets are int64, int32, int16 or uint8. Output: `[N, embedding_dim]`, bit-equal to the
    tables' rows; ids behind the last offset are in no table, and give rows of zeros. Nothing waits for the GPU.

    Args:
        tables: (num_embeddings, embedding_dim) of each table, by name; or in a sequence, for the names "0",
            "1", ... All embedding_dims must be equal, as rows of different lengths have no common shape.
        padding_idx: the row of a table that gets no gradient: one for all tables, by name, or in a sequence;
            None: none. Negative counts from the end.
        sparse: the gradient is a sparse COO tensor (uncoalesced, one entry an id).
        device, dtype: of all tables; fp64, fp32, fp16 or bf16.

    Attributes:
        weight: the one parameter, `[sum of num_embeddings, embedding_dim]`: the tables, one under another.

    `layer[name]` is a table's rows, in the parameter's memory; iterating gives the names. `state_dict` holds
    `name.weight` for each table, as a `ModuleDict` of `torch.nn.Embedding` does.

    Raises:
        ValueError: tables of different embedding_dims; names, shapes or offsets that do not fit.
        IndexError: an id is out of its table's range; when, is set by `gpu_embed.set_bounds_check`. The message
            names the table, the bag, the id's place in it, and the table's rows.
        RuntimeError: a wrong dtype or device; offsets on the CPU that do not cut the ids into bags.
        TypeError: an argument is no tensor.

    Example::

        tables = gpu_embed.TableBatchedEmbedding({"user": (1000, 32), "item": (200, 32)})
        ids = [torch.tensor([[4, 7]]), torch.tensor([[199, 0]])]  # of one example
        rows = tables(*gpu_embed.batch_padded(ids)[:2])  # [4, 32]
    """

    _module_type = torch.nn.Embedding

    def __init__(
        self,
        tables: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]],
        padding_idx: int | PerTable | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = make_layout(tables, "sum", padding_idx)
        if not layout.is_uniform:
            raise ValueError(
                "TableBatchedEmbedding: rows of tables of different embedding_dims have no common shape, got "
                f"{list(layout.embedding_dims)}; TableBatchedEmbeddingBag takes them"
            )
        super().__init__(layout, sparse, device, dtype)

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        return table_functional.table_batched_embedding(
            input, self.weight, offsets, self.tables, self.sparse
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

    Input: the ids of all tables `[N]`, cut by offsets `[T * B + 1]` into bags, table-major as FBGEMM's are: bag
    `t * B + b` is bag b of table t. `gpu_embed.batch_bags` and `gpu_embed.batch_padded` make both. Ids and
    offsets are int64, int32, int16 or uint8. `per_sample_weights` `[N]`, of the tables' dtype, multiply the
    rows, where all tables have mode "sum". Ids behind the last offset are in no bag. Output:
    `[B, sum of embedding_dims]`, the tables side by side; `layer.split(output)` gives each table its view.

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

    Attributes:
        weight: the one parameter. `[sum of num_embeddings, embedding_dim]`, the tables one under another, if
            they have one embedding_dim; else `[elements]`, in which each table begins at a multiple of 8.

    `layer[name]` is a table's rows, in the parameter's memory; iterating gives the names. `state_dict` holds
    `name.weight` for each table, as a `ModuleDict` of `torch.nn.EmbeddingBag` does. Sums are taken in fp32
    (fp64 for fp64) and rounded once; an empty bag's is zero.

    Raises:
        ValueError: names, shapes, modes or offsets that do not fit.
        IndexError, RuntimeError: an id is out of its table's range (an error that is both, as for
            EmbeddingBag); when, is set by `gpu_embed.set_bounds_check`. The message names the table, the bag,
            the id's place in it, and the table's rows.
        RuntimeError: a wrong dtype or device; offsets on the CPU that do not cut the ids into bags.
        NotImplementedError: per_sample_weights, and a table of mode "mean" or "max".
        TypeError: an argument is no tensor.

    Example::

        tables = gpu_embed.TableBatchedEmbeddingBag({"user": (1000, 32), "item": (200, 16)}, mode="mean")
        user = torch.tensor([4, 7, 7]), torch.tensor([0, 1])  # ids and offsets of two bags
        item = torch.tensor([199]), torch.tensor([0, 1])
        means = tables(*gpu_embed.batch_bags([user, item]))  # [2, 48]
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
    ) -> None:
        layout = make_layout(tables, mode, padding_idx)
        super().__init__(layout, sparse, device, dtype)

    def forward(
        self, input: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return table_functional.table_batched_embedding_bag(
            input, self.weight, offsets, self.tables, per_sample_weights, self.sparse
        )

    def split(self, output: Tensor) -> list[Tensor]:
        """Each table's columns of an output `[B, sum of embedding_dims]`: views `[B, embedding_dim]`."""
        return list(output.split(self.layout.embedding_dims, dim=1))

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
