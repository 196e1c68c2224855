"""Many tables of 8 or 4 bits a number in one call, for serving: looked up, and not trained."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import quantized as quantized_functional
from ..functional import tables as table_functional
from ..functional.checks import PLAIN_TYPES
from ..fused_rows import FusedRows, fused_rows, quantize_rows
from ..tables.inputs import BatchSizes, TableInput, reorder
from ..tables.layout import TableColumn, TableLayout, Tables
from .quantized import QuantizedModule, floats
from .tables import BatchedTables, TableBatchedEmbedding, TableBatchedEmbeddingBag, order_of

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedTables(QuantizedModule):
    """What both layers are: for each embedding_dim, its tables' fused rows in one buffer."""

    _float_type: Any  # this package's layer of float tables
    layout: TableLayout
    _tables_on: dict[torch.device, Tables]
    formats: dict[int, FusedRows]  # by embedding_dim, as tables first have it
    output_dtype: torch.dtype | None  # None: `dtype`

    @classmethod
    def from_float(
        cls,
        layer: BatchedTables,
        bits: int = 8,
        group: int | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Self":
        """Batched tables as quantized ones; the layer is left as it is.

        Args:
            layer: this package's batched layer of the same name.
            bits, group: as for `QuantizedEmbedding`.
            dtype: of the output, as if the tables were of it; None: the layer's, with its output_dtype.

        Raises as `QuantizedEmbedding.from_float`; a row is named with its table.
        """
        function = f"{cls.__name__}.from_float"
        if not isinstance(layer, cls._float_type):
            raise TypeError(
                f"{function}: expected {cls._float_type.__name__}, got {type(layer).__name__}"
            )
        if type(layer).forward is not cls._float_type.forward:
            raise TypeError(
                f"{function}: {type(layer).__name__} has a forward of its own, which the codes would not have"
            )
        if type(layer.weight) not in PLAIN_TYPES or layer.weight.is_meta:
            raise TypeError(
                f"{function}: the tables must be a plain tensor to be quantized, and no sharded or meta one"
            )
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self.layout = layout = layer.layout
        dims = dict.fromkeys(layout.embedding_dims)
        self.formats = {dim: fused_rows(function, dim, bits, group) for dim in dims}
        self.dtype = self._checked_dtype(dtype or layer.weight.dtype)
        self.output_dtype = layer.output_dtype if dtype is None else None
        self._tables_on = {}
        for dim, one in self.formats.items():
            parts = [
                quantize_rows(layer._rows(number), one, name)
                for number, name in enumerate(layout.names)
                if layout.embedding_dims[number] == dim
            ]
            self.register_buffer(f"weight_{dim}", torch.cat(parts))
        for name, shape in self._format_shapes().items():
            empty = torch.empty(shape, dtype=torch.uint8, device=layer.weight.device)
            self.register_buffer(name, empty)
        self._prepare()
        return self.train(layer.training)

    def to_float(self) -> Any:
        """A layer with the numbers that the codes stand for, in `dtype`, which can be trained."""
        layout = self.layout
        arguments: dict[str, Any] = {}
        if self._float_type is TableBatchedEmbeddingBag:
            arguments["mode"] = layout.modes
        layer = self._float_type(
            self._sizes(),
            padding_idx=[None if row < 0 else row for row in layout.padding_idx],
            device=self._weights()[0].device,
            dtype=self.dtype,
            output_dtype=self.output_dtype,
            features=self._features(),
            **arguments,
        )
        by_dim = dict(zip(self.formats, self._weights(), strict=True))
        first_rows = self._first_rows()
        with torch.no_grad():
            for name, rows, dim, first in zip(
                layout.names, layout.num_embeddings, layout.embedding_dims, first_rows, strict=True
            ):
                codes = by_dim[dim][first : first + rows]
                layer[name].copy_(floats(codes, self.formats[dim], self.dtype))
        return layer.train(self.training)

    @property
    def tables(self) -> Tables:
        """The layout, and what a call reads of it, on the buffers' device."""
        device = self._weights()[0].device
        found = self._tables_on.get(device)
        if found is None:
            layout, fields = self.layout, self.layout.fields(device)
            first_rows = self._first_rows()
            dims = list(self.formats)
            before = {dim: sum(dims[:number]) for number, dim in enumerate(dims)}
            columns = {
                TableColumn.FIRST_ROW: [first_rows[table] for table in layout.feature_tables],
                TableColumn.FIRST_ELEMENT: [before[dim] for dim in layout.feature_dims],
            }
            for column, values in columns.items():
                fields[:, column] = torch.tensor(values, device=device)
            found = Tables(layout, fields, layout.table_of_column(device))
            # A fake tensor is of no use to later calls.
            if type(found.fields) is Tensor:
                self._tables_on[device] = found
        return found

    def _weights(self) -> list[Tensor]:
        return [self.get_buffer(f"weight_{dim}") for dim in self.formats]

    def _sizes(self) -> dict[str, tuple[int, int]]:
        layout = self.layout
        shapes = zip(layout.num_embeddings, layout.embedding_dims, strict=True)
        return dict(zip(layout.names, shapes, strict=True))

    def _features(self) -> dict[str, str]:
        layout = self.layout
        tables = (layout.names[table] for table in layout.feature_tables)
        return dict(zip(layout.features, tables, strict=True))

    def _first_rows(self) -> list[int]:
        """Where each table begins among the rows of its embedding_dim."""
        ends = dict.fromkeys(self.layout.embedding_dims, 0)
        first_rows = []
        for rows, dim in self._sizes().values():
            first_rows.append(ends[dim])
            ends[dim] += rows
        return first_rows

    def _format_shapes(self) -> dict[str, tuple[int, ...]]:
        """By the names of buffers: of each table 0, rows, embedding_dim, group_size, bits."""
        sizes = enumerate(self._sizes().values())
        return {
            f"weight_format_{number}": (0, rows, *self.formats[dim])
            for number, (rows, dim) in sizes
        }

    def _reason_to_refuse(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        own = type(self).__name__
        shapes = self._format_shapes()
        for (name, shape), table in zip(shapes.items(), self.layout.names, strict=True):
            floats = state_dict.get(f"{prefix}{table}.weight")
            if isinstance(floats, Tensor):
                return (
                    f"this {own} has codes, and what is loaded has table {table!r} in {floats.dtype}: load it into a "
                    f"{self._float_type.__name__}, and quantize that with from_float"
                )
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor) and saved.shape != shape:
                return (
                    f"what is loaded has other tables, bits or groups than this {own}: of table {table!r} "
                    f"{list(saved.shape[1:])}, not {list(shape[1:])} (rows, embedding_dim, group_size, bits)"
                )
        return None

    def _forward(
        self,
        input: Tensor,
        offsets: Any,
        per_sample_weights: Tensor | None,
        features: tuple[str, ...] | int | None,
        batch_sizes: BatchSizes | None,
        *,
        pooled: bool,
    ) -> Tensor:
        own, tables = self.layout.features, self.tables
        order = order_of(type(self).__name__, own, features)
        function = "quantized_table_batched_embedding" + ("_bag" if pooled else "")
        if batch_sizes is not None:
            offsets = table_functional.pad_batch(function, input, offsets, batch_sizes, order)
        if order != own and pooled:
            stand_in = input.new_empty((0, 0), dtype=self.dtype)
            table_functional.check_batch(function, input, offsets, stand_in, self.layout)
            table_functional.check_sample_weights(input, per_sample_weights, stand_in, self.layout)
            batch = TableInput(input, offsets, per_sample_weights)
            batch = reorder(batch, [order.index(feature) for feature in own])
            input, offsets, per_sample_weights, *_ = batch
        elif order != own:
            # Rows follow the ids, so the tables follow the order of the batch.
            fields = torch.stack([tables.fields[own.index(feature)] for feature in order])
            tables = tables._replace(fields=fields)
        formats = [number for one in self.formats.values() for number in one]
        return quantized_functional.quantized_tables(
            input,
            offsets,
            self._weights(),
            formats,
            tables,
            self.dtype,
            self.output_dtype or self.dtype,
            per_sample_weights,
            pooled=pooled,
        )

    def _prepare(self) -> None:
        # Made here and not in a call, which may be compiled or captured in a CUDA graph.
        self.tables  # noqa: B018

    def _apply(self, fn: Any, recurse: bool = True) -> "Self":
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Numbers of names belong to this process.
        return {**self.__dict__, "_tables_on": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        shapes = [f"{name}: {size}" for name, size in self._sizes().items()]
        formats = [
            f"{one.bits} bits, {one.group_size} columns a scale" for one in self.formats.values()
        ]
        return ", ".join([*shapes, *dict.fromkeys(formats), f"dtype={self.dtype}"])


class QuantizedTableBatchedEmbedding(QuantizedTables):
    """`TableBatchedEmbedding` of 8 or 4 bits a number; made by `from_float`, and not trained.

    A call takes what that takes and returns rows `[N, embedding_dim]` of `output_dtype` or, if that is None, `dtype`.
    Errors are the same.

    Example::

        tables = gpu_embed.TableBatchedEmbedding({"user": (1000, 32), "item": (200, 32)})
        small = gpu_embed.QuantizedEmbedding.from_float(tables, bits=8)
        ids = {"user": torch.tensor([[4, 7]]), "item": torch.tensor([[199, 0]])}
        rows = small(*gpu_embed.batch_padded(ids))  # [4, 32]
    """

    _float_type = TableBatchedEmbedding

    def forward(
        self,
        input: Tensor,
        offsets: Tensor,
        per_sample_weights: None = None,
        features: tuple[str, ...] | int | None = None,
        batch_sizes: BatchSizes | None = None,
    ) -> Tensor:
        if per_sample_weights is not None:
            raise NotImplementedError(
                "QuantizedTableBatchedEmbedding: per_sample_weights are for bags; use "
                "QuantizedTableBatchedEmbeddingBag"
            )
        return self._forward(input, offsets, None, features, batch_sizes, pooled=False)


class QuantizedTableBatchedEmbeddingBag(QuantizedTables):
    """`TableBatchedEmbeddingBag` of 8 or 4 bits a number; made by `from_float`, and not trained.

    A call takes what that takes, with per-sample weights of `dtype`, and returns `[B, sum of embedding_dims]` of
    `output_dtype` or, if that is None, `dtype`; `split` is as there. On the way each id's row is written in fp32, once
    for each embedding_dim that the tables have.

    Example::

        tables = gpu_embed.TableBatchedEmbeddingBag({"user": (1000, 64), "item": (200, 16)})
        small = gpu_embed.QuantizedEmbeddingBag.from_float(tables, bits=4)
        ids = {"user": torch.tensor([[4, 7]]), "item": torch.tensor([[199]])}
        sums = small(*gpu_embed.batch_padded(ids))  # [1, 80]
    """

    _float_type = TableBatchedEmbeddingBag
    split = TableBatchedEmbeddingBag.split

    def forward(
        self,
        input: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        features: tuple[str, ...] | int | None = None,
        batch_sizes: BatchSizes | None = None,
    ) -> Tensor:
        return self._forward(input, offsets, per_sample_weights, features, batch_sizes, pooled=True)
