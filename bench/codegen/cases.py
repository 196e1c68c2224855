"""The calls of the Triton backend whose kernels `codegen` compiles: one line a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from math import gcd, inf

import torch
from torch import Tensor

import gpu_embed
from gpu_embed.backends._plan.access import cdiv
from gpu_embed.backends._triton import TritonBackend
from gpu_embed.backends._triton.launch import GATHER_ROWS
from gpu_embed.bags import Bags
from gpu_embed.bounds import BoundsRecord
from gpu_embed.dtypes import accumulation
from gpu_embed.fused_rows import fused_rows
from gpu_embed.row_update import STATE, RowUpdate, Stream
from gpu_embed.shard import Shard
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.entries import TableEntries
from gpu_embed.tables.layout import TableLayout, make_layout
from gpu_embed.take import QuantizedTable, fused_table

from ..candidates import launch as candidates

META = torch.device("meta")
_empty = partial(torch.empty, device=META)


@dataclass(frozen=True)
class Case:
    """One call of the backend, by the shapes and dtypes that decide what it launches."""

    operation: str  # a name in OPERATIONS
    embedding_dim: int = 1
    dtype: torch.dtype = torch.float32
    num_indices: int = 64
    num_embeddings: int = 50_000
    index_dtype: torch.dtype = torch.int64
    padding_idx: int = -1
    record: bool = False  # whether ids out of range are recorded
    scale_grad_by_freq: bool = False
    norm_type: float = 2.0
    transposed: bool = False  # the columns of the table, or of the gradient, lie apart
    num_bags: int = 32
    equal_lengths: bool = False  # of the bags, which so need no offsets
    per_sample_weights: bool = False
    mean: bool = False  # the gradient of a mean, not of a sum
    max: bool = False  # the gradient of tables of which some take maxima
    lr_on_device: bool = False
    rows: bool = False  # whether only some rows may change
    stochastic_rounding: bool = False
    weight_decay: bool = False  # of the rows used
    dims: tuple[int, ...] = ()  # of batched tables, the widest's first
    output_dtype: torch.dtype | None = None  # None: the table's
    into: torch.dtype | None = None  # of a gradient that exists, to which this one is added
    rows_apart: bool = False  # of that gradient
    # Columns of a quantized row that share a scale and a zero; 0: all, with no zero.
    group_size: int = 0
    first_row: int | None = None  # of a shard

    def __str__(self) -> str:
        """The operation, D, the dtype, and what differs from the defaults."""
        words = [self.operation, f"D{self.embedding_dim}", _text(self.dtype)]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(SHORT.get(field.name, field.name) + _text(value))
        return "-".join(words)

    @property
    def architecture(self) -> int:
        """The oldest that it is for."""
        return 90 if self.operation in ("embedding_descriptor", "descriptor") else 80

    def call(self, backend: TritonBackend) -> None:
        """Call the backend on tensors without data, whose addresses count as aligned."""
        OPERATIONS[self.operation](self, backend)

    def ids(self) -> Tensor:
        return _empty(self.num_indices, dtype=self.index_dtype)

    def matrix(self, rows: int) -> Tensor:
        """[rows, D]: the table, or its rows' gradients."""
        if self.transposed:
            return _empty(self.embedding_dim, rows, dtype=self.dtype).T
        return _empty(rows, self.embedding_dim, dtype=self.dtype)

    def weight(self) -> Tensor:
        return self.matrix(self.num_embeddings)

    def existing(self, *shape: int) -> Tensor | None:
        """The gradient to which this one is added."""
        if self.into is None:
            return None
        gap = 16 * self.rows_apart
        return _empty(*shape[:-1], shape[-1] + gap, dtype=self.into)[..., : shape[-1]]

    @property
    def gradient_itemsize(self) -> int:
        return (self.into or self.dtype).itemsize

    def bounds(self) -> BoundsRecord | None:
        return BoundsRecord(META) if self.record else None

    @property
    def shard(self) -> Shard | None:
        if self.first_row is None:
            return None
        # All ranks know the same number of rows.
        return Shard(
            self.first_row, max(self.first_row, 2 * self.num_embeddings) + self.num_embeddings
        )

    def bags(self) -> Bags:
        offsets = None if self.equal_lengths else self.ids().new_empty(self.num_bags)
        return Bags(self.ids(), offsets, self.num_bags)

    def bag_weights(self) -> Tensor | None:
        return _empty(self.num_indices, dtype=self.dtype) if self.per_sample_weights else None

    def update(self, formula: str) -> RowUpdate:
        return RowUpdate(
            formula,
            step_size=0.1,
            weight_decay=float(self.weight_decay),
            lr=_empty(1, dtype=torch.float64) if self.lr_on_device else None,
            stream=Stream(1, 1) if self.stochastic_rounding else None,
        )

    def state(self, formula: str, num_rows: int, weight: Tensor) -> tuple[Tensor, ...]:
        """What the optimizer keeps for the rows or the numbers of the weight."""
        dtype = accumulation(self.dtype)
        return tuple(
            _empty(num_rows if state.per_row else weight.shape, dtype=dtype)
            for state in STATE[formula]
        )

    def changing(self, num_rows: int) -> Tensor | None:
        """Which rows may change."""
        return _empty(num_rows, dtype=torch.bool) if self.rows else None

    @property
    def layout(self) -> TableLayout:
        """Of batched tables."""
        mode = "mean" if self.mean else "sum"
        return make_layout([(self.num_embeddings, dim) for dim in self.dims], mode, None)

    def tables(
        self, *, pooled: bool = True, with_argmax: bool = False
    ) -> tuple[Tensor, TableBatch]:
        """The buffer of batched tables, and their ids, by the shapes of both."""
        layout = self.layout
        batch = TableBatch(
            self.ids(),
            self.ids().new_empty(layout.num_tables * self.num_bags + 1),
            layout.fields(META),
            layout.table_of_column(META),
            layout.shape(pooled),
        )
        if with_argmax:
            positions = _empty(self.num_bags, batch.width, dtype=batch.position_dtype)
            batch = replace(batch, max_positions=positions)
        return _empty(layout.buffer_shape, dtype=self.dtype), batch

    def access_bytes(self, itemsize: int) -> int:
        """The widest access that rows of this case allow, their items being of that size."""
        widths = [dim * itemsize for dim in self.dims or (self.embedding_dim,)]
        return itemsize if self.transposed else gcd(16, *widths)

    @property
    def gradient_vector(self) -> int:
        """Columns that one access of a gradient's kernels moves: of values, and of the rows that they are added to."""
        itemsizes = {self.dtype.itemsize, self.gradient_itemsize}
        return min(self.access_bytes(itemsize) // itemsize for itemsize in itemsizes)


# Before the value of a field in the name of a case; other fields are flags.
SHORT = {
    "num_indices": "N",
    "num_embeddings": "V",
    "index_dtype": "ids_",
    "padding_idx": "padding",
    "norm_type": "norm",
    "num_bags": "B",
    "output_dtype": "to_",
    "into": "into_",
    "group_size": "G",
    "first_row": "shard",
}


def _text(value: object) -> str:
    if value is True:
        return ""
    if isinstance(value, tuple):
        return f"{len(value)}x{value[0]}" if len(set(value)) == 1 else "_".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")


def _candidate_gradient(case: Case, backend: TritonBackend) -> None:
    candidate = candidates.one_hot if case.operation == "one_hot" else candidates.scatter_add
    grad_output = case.matrix(case.num_indices)
    candidate(backend, grad_output, case.ids(), case.num_embeddings, case.padding_idx)


def _gradient(case: Case, backend: TritonBackend) -> None:
    with gpu_embed.use_gradient_method(case.operation):
        backend.embedding_dense_backward(
            case.matrix(case.num_indices),
            case.ids(),
            case.num_embeddings,
            case.padding_idx,
            case.scale_grad_by_freq,
            case.existing(case.num_embeddings, case.embedding_dim),
            case.shard,
        )


def _bag(case: Case, backend: TritonBackend) -> None:
    mode = case.operation.removeprefix("bag_")
    backend.embedding_bag(
        case.weight(),
        case.bag_weights(),
        case.bags(),
        case.padding_idx,
        mode,
        case.bounds(),
        case.shard,
    )


def _bag_gradient(case: Case, backend: TritonBackend) -> None:
    with gpu_embed.use_gradient_method(case.operation.removeprefix("bag_")):
        backend.embedding_bag_dense_backward(
            case.matrix(case.num_bags),
            case.bag_weights(),
            case.bags(),
            case.num_embeddings,
            case.padding_idx,
            "mean" if case.mean else "sum",
            case.scale_grad_by_freq,
            case.existing(case.num_embeddings, case.embedding_dim),
            case.shard,
        )


def _bag_sample_weights(case: Case, backend: TritonBackend) -> None:
    grad_output = case.matrix(case.num_bags)
    backend.embedding_bag_sample_weights_backward(
        grad_output, case.weight(), case.bags(), case.padding_idx, case.shard
    )


def _row_update(case: Case, backend: TritonBackend) -> None:
    weight, num_rows = case.weight(), case.num_embeddings
    update, state = case.update(case.operation), case.state(case.operation, num_rows, weight)
    values = case.matrix(case.num_indices)
    backend.row_update_(update, weight, state, case.ids(), values, case.changing(num_rows))


def _table_lookup(case: Case, backend: TritonBackend) -> None:
    weight, batch = case.tables(pooled=case.operation == "table_bag")
    backend.table_batched_embedding(weight, case.bag_weights(), batch, False, case.bounds())


def _table_gradient(case: Case, backend: TritonBackend) -> None:
    weight, batch = case.tables(with_argmax=case.max)
    grad_output = weight.new_ones(case.num_bags, batch.width)
    with gpu_embed.use_gradient_method(case.operation.removeprefix("table_")):
        backend.table_batched_embedding_dense_backward(
            grad_output, case.bag_weights(), batch, weight.shape, case.existing(*weight.shape)
        )


def _table_sample_weights(case: Case, backend: TritonBackend) -> None:
    weight, batch = case.tables()
    grad_output = weight.new_empty(case.num_bags, batch.width)
    backend.table_batched_embedding_sample_weights_backward(grad_output, weight, batch)


def _dequantize(case: Case, backend: TritonBackend) -> None:
    """dtype is the scale's."""
    bits = int(case.operation.removeprefix("dequantize_int"))
    rows, dim = case.num_embeddings, case.embedding_dim
    group_size = case.group_size or dim
    values = _empty(rows, cdiv(dim * bits, 8), dtype=torch.int8)
    scale = _empty(rows, cdiv(dim, group_size), dtype=case.dtype)
    zero = torch.empty_like(scale, dtype=torch.int8) if case.group_size else None
    table = QuantizedTable(values, scale, zero, dim, group_size, bits)
    dtype = case.output_dtype or case.dtype
    backend.dequantize_rows(table, case.ids(), dtype, case.bounds())


def _fused(case: Case, backend: TritonBackend) -> None:
    """dtype is the scale's, too."""
    bits = int(case.operation.removeprefix("fused_int"))
    layout = fused_rows("codegen", case.embedding_dim, bits, case.group_size or "row")
    assert layout.scale_dtype == case.dtype
    weight = _empty(case.num_embeddings, layout.row_bytes, dtype=torch.uint8)
    dtype = case.output_dtype or case.dtype
    backend.dequantize_rows(fused_table(weight, layout), case.ids(), dtype, case.bounds())


def _table_update(case: Case, backend: TritonBackend) -> None:
    weight, batch = case.tables(with_argmax=case.max)
    formula, num_rows = case.operation.removeprefix("table_"), batch.shape.num_rows
    entries = TableEntries(
        case.ids(),
        case.ids().to(torch.int32),
        _empty(case.num_indices, dtype=accumulation(case.dtype)) if case.mean else None,
        batch.max_positions,
        weight.new_empty(case.num_bags, batch.width),
        batch.fields,
        num_rows,
        batch.shape.widest,
        batch.shape.dim_divisor,
    )
    state = case.state(formula, num_rows, weight)
    backend.table_row_update_(case.update(formula), weight, state, entries, case.changing(num_rows))


OPERATIONS: dict[str, Callable[[Case, TritonBackend], object]] = {
    "embedding": lambda c, backend: backend.embedding(
        c.weight(), c.ids(), c.padding_idx, c.bounds(), c.shard
    ),
    "embedding_descriptor": lambda c, backend: candidates.gather(
        backend, c.weight(), c.ids(), c.padding_idx, c.bounds()
    ),
    **dict.fromkeys(("atomic", "sorted_atomic", "sorted"), _gradient),
    **dict.fromkeys(("descriptor", "one_hot"), _candidate_gradient),
    "renorm": lambda c, backend: backend.embedding_renorm_(
        c.weight(), c.ids(), 1.5, c.norm_type, c.shard
    ),
    "counts": lambda c, backend: backend.embedding_counts(c.ids(), c.num_embeddings, c.shard),
    **dict.fromkeys(("bag_sum", "bag_mean"), _bag),
    "bag_max": lambda c, backend: backend.embedding_bag_max(
        c.weight(), c.bags(), c.padding_idx, True, c.bounds(), c.shard
    ),
    **dict.fromkeys(("bag_atomic", "bag_sorted"), _bag_gradient),
    "bag_sample_weights": _bag_sample_weights,
    **dict.fromkeys(("table_bag", "table_rows"), _table_lookup),
    **dict.fromkeys(("table_atomic", "table_sorted"), _table_gradient),
    "table_max": lambda c, backend: backend.table_batched_embedding_max(
        *c.tables(), True, c.bounds()
    ),
    "table_sample_weights": _table_sample_weights,
    "take": lambda c, backend: backend.take_rows(
        c.weight(), c.ids(), c.output_dtype or c.dtype, c.bounds()
    ),
    **dict.fromkeys(("dequantize_int8", "dequantize_int4"), _dequantize),
    **dict.fromkeys(("fused_int8", "fused_int4"), _fused),
    **{f"table_{formula}": _table_update for formula in STATE},
    **dict.fromkeys(STATE, _row_update),
}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Triton compiles another kernel where an integer argument is 1, or is a multiple of 16, or needs 64 bits.
PAST_INT32 = 2**31 + 16
# As many ids as can be sorted, less a few so that vectors fit.
MOST_SORTED = 2**31 - 16
FIRST_ROWS = (0, 1, 4096)
FAR_ROW = 2**40 + 4096
CASES = (
    # Every row of the gather's table; its key is words of 8 bytes.
    *(Case("embedding", 4 * words, BF16, record=True) for words in GATHER_ROWS),
    Case("embedding", 8 * max(GATHER_ROWS), BF16),
    Case("embedding", 128, FP32, num_indices=3073, index_dtype=torch.int32),
    Case("embedding", 64, FP32, num_embeddings=1, num_indices=1),
    Case("embedding", 64, FP32, transposed=True),
    Case("embedding", 1, FP64, record=True),
    Case("embedding", 1, BF16, record=True),
    Case("embedding", 1, torch.int32, padding_idx=3),
    Case("embedding", 4, torch.uint8, num_indices=PAST_INT32, record=True),
    # Rows that are no power of two of words.
    Case("embedding", 768, BF16, record=True),
    Case("embedding", 768, BF16, num_indices=1, record=True),
    Case("embedding", 12, FP32, index_dtype=torch.int32),
    Case("embedding", 3, torch.complex128),
    Case("embedding", 300, BF16, record=True),
    Case("embedding", 50, FP32, num_indices=3073),
    Case("embedding", 5, FP32, index_dtype=torch.int16, record=True),
    Case("embedding", 33, FP16, index_dtype=torch.uint8, record=True),
    Case("embedding", 3, torch.uint8, num_indices=PAST_INT32),
    Case("embedding", 33, FP16, transposed=True),
    Case("atomic", 128),
    Case("atomic", 768, num_indices=3073, index_dtype=torch.int32, padding_idx=0),
    Case("atomic", 50),
    Case("atomic", 33),
    Case("atomic", 1),
    Case("atomic", 4, num_indices=1, num_embeddings=1, padding_idx=0),
    Case("atomic", 4, num_indices=PAST_INT32, index_dtype=torch.uint8),
    Case("atomic", 64, transposed=True),
    Case("atomic", 32, FP64),
    Case("atomic", 33, FP64),
    Case("sorted", 4096, BF16),
    Case("sorted", 768, BF16, scale_grad_by_freq=True, num_embeddings=100),
    Case("sorted", 300, BF16),
    Case("sorted", 50, BF16, index_dtype=torch.uint8, num_embeddings=200),
    Case("sorted", 1, BF16),
    Case("sorted", 64, BF16, transposed=True),
    Case("sorted", 768, FP32),
    Case("sorted", 50, FP32, scale_grad_by_freq=True, padding_idx=0),
    Case("sorted", 16, FP32, num_indices=3073),
    Case("sorted", 1, FP32, num_indices=MOST_SORTED, num_embeddings=PAST_INT32),
    Case("sorted", 64, FP64),
    Case("sorted", 33, FP64, scale_grad_by_freq=True),
    Case("sorted", 128, FP32, num_indices=1, num_embeddings=1),
    Case("sorted", 2, BF16, num_embeddings=PAST_INT32),
    Case("atomic", 128, into=FP32, rows_apart=True),
    Case("atomic", 128, BF16, into=FP32),
    Case("atomic", 33, FP64, into=FP64, rows_apart=True),
    Case("sorted", 128, FP32, into=FP32),
    Case("sorted", 768, FP32, into=FP32, rows_apart=True),
    Case("sorted", 4096, BF16, into=FP32),
    Case("sorted", 4096, BF16, into=BF16),
    Case("sorted", 300, FP16, into=FP16, scale_grad_by_freq=True),
    Case("sorted", 33, FP64, into=FP64),
    *(Case("renorm", 128, norm_type=norm_type) for norm_type in (2.0, 1.0, 0.0, inf, -inf, 2.5)),
    Case("renorm", 300, BF16),
    Case("renorm", 4096, FP16, norm_type=3.0),
    Case("renorm", 33, FP64, norm_type=-1.0),
    Case("renorm", 1, FP64, num_indices=1, num_embeddings=1),
    Case("renorm", 64, transposed=True),
    Case("counts"),
    Case("counts", num_indices=PAST_INT32, index_dtype=torch.uint8),
    Case("bag_sum", 128, FP32, record=True),
    Case("bag_sum", 128, FP32, record=True, equal_lengths=True, index_dtype=torch.int32),
    Case("bag_sum", 128, BF16, record=True, padding_idx=0),
    Case("bag_sum", 32, FP32, record=True),
    Case("bag_sum", 64, FP16, per_sample_weights=True),
    Case("bag_sum", 300, BF16, per_sample_weights=True, record=True),
    Case("bag_sum", 4096, BF16, num_indices=1, num_bags=1),
    Case("bag_sum", 50, FP32, num_indices=3073, record=True),
    Case("bag_sum", 33, FP64),
    Case("bag_sum", 1, BF16, index_dtype=torch.uint8),
    Case("bag_sum", 64, FP32, transposed=True),
    Case("bag_sum", 4, FP32, num_indices=PAST_INT32, num_bags=PAST_INT32, index_dtype=torch.uint8),
    Case("bag_mean", 128, FP32, record=True),
    Case("bag_mean", 32, BF16, record=True, padding_idx=0),
    Case("bag_mean", 64, FP64),
    Case("bag_mean", 128, FP32, num_indices=2**20, num_bags=4),
    Case("bag_sum", 32, BF16, num_indices=2**20, num_bags=4, record=True),
    Case("bag_max", 128, FP32, record=True),
    Case("bag_max", 64, BF16, record=True, equal_lengths=True),
    Case("bag_max", 300, FP16),
    Case("bag_max", 33, FP64, padding_idx=0),
    Case("bag_atomic", 128, FP32),
    Case("bag_atomic", 128, FP32, per_sample_weights=True, equal_lengths=True),
    Case("bag_atomic", 50, FP32, mean=True, padding_idx=0),
    Case("bag_atomic", 32, FP64, mean=True),
    Case("bag_sorted", 128, BF16),
    Case("bag_sorted", 768, BF16, per_sample_weights=True, scale_grad_by_freq=True),
    Case("bag_sorted", 64, BF16, mean=True, equal_lengths=True),
    Case("bag_sorted", 128, FP32, mean=True, padding_idx=0),
    Case("bag_sorted", 33, FP64, per_sample_weights=True),
    Case("bag_atomic", 128, BF16, into=FP32, mean=True),
    Case("bag_sorted", 128, BF16, into=FP32, per_sample_weights=True),
    Case("bag_sample_weights", 128, FP32),
    Case("bag_sample_weights", 300, BF16, padding_idx=0),
    Case("bag_sample_weights", 33, FP64),
    Case("bag_sample_weights", 64, FP32, transposed=True),
    Case("table_bag", 128, FP32, record=True, dims=(128,) * 32),
    Case("table_bag", 128, BF16, record=True, mean=True, dims=(128, 64, 32)),
    Case("table_bag", 64, FP32, per_sample_weights=True, dims=(64, 10)),
    Case("table_bag", 512, FP64, mean=True, dims=(512, 33)),
    Case("table_bag", 8, FP16, index_dtype=torch.uint8, record=True, dims=(8, 8, 8)),
    Case("table_bag", 128, FP32, num_indices=2**20, num_bags=4, mean=True, dims=(128, 64)),
    Case("table_bag", 1, BF16, num_indices=1, num_bags=1, num_embeddings=1, dims=(1,)),
    Case("table_bag", 4, FP32, num_indices=PAST_INT32, num_bags=PAST_INT32, dims=(4, 4)),
    Case("table_max", 128, FP32, record=True, dims=(128, 64)),
    Case("table_max", 64, BF16, mean=True, dims=(64, 8)),
    Case("table_max", 33, FP64, dims=(33, 1)),
    Case("table_rows", 128, FP32, record=True, dims=(128,) * 32),
    Case("table_rows", 8, BF16, record=True, index_dtype=torch.int32, dims=(8, 8)),
    Case("table_rows", 8, FP64, record=True, dims=(8, 8)),
    Case("table_rows", 300, FP16, num_indices=3073, dims=(300, 300)),
    Case("table_rows", 1, BF16, num_indices=1, num_bags=1, num_embeddings=1, dims=(1,)),
    Case("table_atomic", 128, FP32, dims=(128,) * 32),
    Case("table_atomic", 128, FP32, mean=True, dims=(128, 64, 32)),
    Case("table_atomic", 64, FP32, per_sample_weights=True, dims=(64, 10)),
    Case("table_atomic", 64, FP64, num_indices=2**20, num_bags=4, mean=True, dims=(64, 64)),
    Case("table_atomic", 4, FP32, num_indices=PAST_INT32, num_bags=PAST_INT32, dims=(4, 4)),
    Case("table_sorted", 128, BF16, mean=True, dims=(128, 128)),
    Case("table_sorted", 128, FP32, mean=True, dims=(128, 64, 32)),
    Case("table_sorted", 512, BF16, per_sample_weights=True, dims=(512, 64)),
    Case("table_sorted", 300, FP16, dims=(300, 12)),
    Case("table_sorted", 33, FP64, index_dtype=torch.int32, dims=(33, 8)),
    Case("table_atomic", 128, BF16, mean=True, into=FP32, dims=(128, 64, 32)),
    Case("table_sorted", 128, BF16, into=FP32, dims=(128, 64, 32)),
    Case("table_sorted", 128, BF16, into=BF16, max=True, dims=(128, 64)),
    Case("table_atomic", 128, FP32, max=True, dims=(128, 64, 32)),
    Case("table_sorted", 128, BF16, max=True, mean=True, dims=(128, 128)),
    Case("table_sorted", 128, FP32, max=True, dims=(128, 64)),
    Case("table_sample_weights", 128, FP32, dims=(128, 64)),
    Case("table_sample_weights", 300, BF16, dims=(300, 8)),
    Case("table_sample_weights", 33, FP64, num_indices=3073, dims=(33,)),
    Case("table_sgd", 128, BF16, stochastic_rounding=True, dims=(128, 64)),
    Case("table_momentum", 128, FP32, weight_decay=True, dims=(128, 64)),
    Case("table_nesterov", 128, BF16, mean=True, dims=(128, 64, 32)),
    Case("table_adagrad", 128, FP32, mean=True, dims=(128, 64, 32)),
    Case("table_adam", 128, FP32, max=True, rows=True, dims=(128, 64)),
    Case("table_adam", 33, FP64, dims=(33, 8)),
    Case("table_rowwise_adagrad", 128, FP32, dims=(128, 64, 32)),
    Case("table_rowwise_adagrad", 768, BF16, mean=True, dims=(768, 64)),
    Case("table_rowwise_adagrad", 8192, BF16, stochastic_rounding=True, dims=(8192, 8)),
    Case("table_rowwise_adagrad", 8192, BF16, weight_decay=True, dims=(8192, 8)),
    Case("sgd", 128, lr_on_device=True),
    Case("sgd", 128, BF16, stochastic_rounding=True),
    Case("momentum", 128),
    Case("momentum", 33, FP64, weight_decay=True),
    Case("nesterov", 128, BF16, stochastic_rounding=True, weight_decay=True),
    Case("nesterov", 300, FP16, lr_on_device=True),
    Case("adagrad", 128),
    Case("adagrad", 128, BF16, weight_decay=True),
    Case("adagrad", 33, FP16),
    Case("adam", 128, rows=True),
    Case("adam", 300, num_indices=3073, lr_on_device=True),
    Case("adam", 16),
    Case("adam", 1, num_indices=MOST_SORTED, num_embeddings=PAST_INT32),
    Case("adam", 64, transposed=True),
    Case("adam", 64, FP64),
    Case("adam", 128, BF16),
    Case("adam", 128, FP16, stochastic_rounding=True),
    # A row in a program of one warp, of several, and in none.
    Case("rowwise_adagrad", 16),
    Case("rowwise_adagrad", 128),
    Case("rowwise_adagrad", 768, BF16, lr_on_device=True),
    Case("rowwise_adagrad", 768, weight_decay=True),
    Case("rowwise_adagrad", 4096),
    Case("rowwise_adagrad", 2048, FP64),
    Case("rowwise_adagrad", 5000),
    Case("rowwise_adagrad", 5000, weight_decay=True),
    Case("rowwise_adagrad", 8192, BF16, stochastic_rounding=True, lr_on_device=True),
    Case("embedding_descriptor", 4096, BF16, record=True),
    Case("embedding_descriptor", 768, BF16),
    Case("embedding_descriptor", 128, FP32, record=True, padding_idx=0),
    Case("embedding_descriptor", 12, FP32, index_dtype=torch.uint8),
    Case("embedding_descriptor", 1, torch.complex128, num_indices=1),
    Case("descriptor", 768),
    Case("descriptor", 128, padding_idx=0),
    Case("descriptor", 4, index_dtype=torch.uint8),
    Case("descriptor", 64, transposed=True),
    Case("sorted_atomic", 768),
    Case("sorted_atomic", 33, padding_idx=0),
    Case("sorted_atomic", 16, num_indices=3073),
    Case("sorted_atomic", 64, FP64),
    Case("sorted_atomic", 768, into=FP32, rows_apart=True),
    # Every row of the one-hot table.
    *(Case("one_hot", 768, BF16, num_embeddings=rows) for rows in candidates.ONE_HOT),
    Case("one_hot", 33, FP16, num_embeddings=200, index_dtype=torch.uint8, padding_idx=0),
    Case("one_hot", 8, BF16, num_embeddings=256),
    Case("one_hot", 64, BF16, num_embeddings=2, transposed=True),
    Case("take", 128, FP32, record=True),
    Case("take", 128, FP32, record=True, output_dtype=BF16, index_dtype=torch.int32),
    Case("take", 300, BF16, index_dtype=FP32, record=True),
    Case("take", 50, FP32, output_dtype=FP16, num_indices=3073),
    Case("take", 1, FP32, num_indices=1, num_embeddings=1),
    Case("take", 4, FP32, num_indices=PAST_INT32, index_dtype=torch.int8, record=True),
    Case("take", 64, FP32, transposed=True),
    Case("dequantize_int8", 128, FP32, record=True),
    Case("dequantize_int8", 768, FP32, output_dtype=BF16, record=True, index_dtype=torch.int32),
    Case("dequantize_int4", 768, BF16, record=True),
    Case("dequantize_int4", 256, FP32, group_size=128, record=True),
    Case("dequantize_int4", 256, FP32, group_size=128, output_dtype=FP16, record=True),
    Case("dequantize_int4", 33, FP32, num_indices=3073, record=True),
    Case("dequantize_int4", 4, FP32, num_indices=PAST_INT32, num_embeddings=PAST_INT32),
    Case("fused_int8", 256, FP32, record=True),
    Case("fused_int8", 768, FP32, output_dtype=BF16, record=True, index_dtype=torch.int32),
    Case("fused_int4", 256, FP16, group_size=64, output_dtype=FP32, record=True),
    Case("fused_int4", 256, FP16, group_size=64, record=True),
    Case("fused_int4", 33, FP16, group_size=32, output_dtype=FP32, num_indices=3073, record=True),
    Case("fused_int4", 4, FP16, num_indices=PAST_INT32, num_embeddings=PAST_INT32),
    # Shards; one binary serves every first row below 2**31.
    *(Case("embedding", 128, FP32, record=True, first_row=row) for row in FIRST_ROWS),
    Case("embedding", 1024, BF16, record=True, first_row=4096),
    Case("embedding", 300, BF16, record=True, first_row=FAR_ROW),
    Case("embedding", 5, FP32, index_dtype=torch.int16, record=True, first_row=4096),
    Case("atomic", 128, first_row=4096),
    Case("atomic", 768, num_indices=3073, index_dtype=torch.int32, padding_idx=0, first_row=4096),
    Case("atomic", 50, first_row=FAR_ROW),
    Case("sorted", 4096, BF16, first_row=4096),
    Case("renorm", 128, first_row=4096),
    Case("counts", first_row=4096),
    Case("bag_sum", 128, FP32, record=True, first_row=4096),
    Case("bag_sum", 300, BF16, per_sample_weights=True, record=True, first_row=FAR_ROW),
    Case("bag_sum", 32, BF16, num_indices=2**20, num_bags=4, record=True, first_row=4096),
    Case("bag_mean", 32, BF16, record=True, padding_idx=0, first_row=4096),
    Case("bag_max", 128, FP32, record=True, first_row=4096),
    Case("bag_max", 300, FP16, first_row=FAR_ROW),
    Case("bag_atomic", 50, FP32, mean=True, padding_idx=0, first_row=4096),
    Case("bag_sample_weights", 128, FP32, first_row=4096),
)
