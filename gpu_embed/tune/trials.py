"""What tells whether a kernel's settings are right and fast: one operation a kernel, small inputs and large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends._plan.gather import use_gather_method
from ..backends._plan.gradient_method import use_gradient_method
from ..bags import Bags
from ..bounds import BoundsRecord
from ..dtypes import accumulation
from ..row_update import STATE, RowUpdate
from ..tables.batch import TableBatch
from ..tables.entries import TableEntries
from ..tables.layout import TableLayout, make_layout
from ..take import QuantizedTable

SKEWS = ("uniform", "zipf", "hot")
# Ids a bag, on average.
BAG_LENGTH = 20


@dataclass(frozen=True)
class Input:
    """What an operation is called with. Tensors are made on their device, and the same on each."""

    num_indices: int
    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype = torch.float32
    padding_idx: int = -1
    strided: bool = False  # rows and columns of tables and gradients lie apart
    bad: bool = False  # some ids are out of range
    exact: bool = True  # small integers, whose sums are exact in any order
    skew: str = "uniform"  # of SKEWS

    def ids(self, device: torch.device) -> Tensor:
        random = torch.arange(self.num_indices, device=device) * 2654435761 % 2**32
        if self.skew == "zipf":
            ids = (self.num_embeddings ** (random / 2**32)).to(torch.int64) - 1
        else:
            ids = random * self.num_embeddings >> 32
        if self.skew == "hot":
            ids[::2] = 0
        if self.bad:
            ids[::5] = -1
            ids[3::7] = self.num_embeddings
        return ids

    def matrix(self, rows: int, device: torch.device, dim: int | None = None) -> Tensor:
        """[rows, D]: a table, or gradients."""
        dim = self.embedding_dim if dim is None else dim
        if self.strided:
            return self.numbers((rows, 2 * dim), device)[:, ::2]
        return self.numbers((rows, dim), device)

    def numbers(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        count = torch.arange(torch.Size(shape).numel(), device=device)
        if self.exact:
            return (count % 11 - 5).to(self.dtype).view(shape)
        return (count * 2654435761 % 9973 / 9973 - 0.5).to(self.dtype).view(shape)

    def bags(self, device: torch.device) -> Bags:
        """Bags of different lengths, empty ones among them."""
        num_bags = max(self.num_indices // BAG_LENGTH, 2)
        step = torch.arange(num_bags, device=device)
        offsets = (step * BAG_LENGTH - step % 3 * (BAG_LENGTH // 2)).clamp(0, self.num_indices)
        return Bags(self.ids(device), offsets, num_bags)

    def tables(
        self, device: torch.device, dims: tuple[int, ...], pooled: bool
    ) -> tuple[TableLayout, TableBatch]:
        """Tables of these widths, with as many ids each."""
        layout = make_layout([(self.num_embeddings, dim) for dim in dims], "sum", None)
        num_bags = max(self.num_indices // BAG_LENGTH // len(dims), 1)
        offsets = torch.arange(len(dims) * num_bags + 1, device=device)
        offsets = offsets * (self.num_indices // (len(dims) * num_bags))
        fields, table_of_column = layout.fields(device), layout.table_of_column(device)
        shape = layout.shape(pooled)
        return layout, TableBatch(self.ids(device), offsets, fields, table_of_column, shape)

    def record(self, device: torch.device) -> BoundsRecord:
        return BoundsRecord(device)


# Runs a backend's operation; what it returns was computed.
Operation = Callable[[Any, Input, torch.device], tuple[Tensor, ...]]


def _lookup(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    weight = given.matrix(given.num_embeddings, device)
    record = given.record(device)
    # A launch keeps no table alive, so who repeats it must.
    return backend.embedding(weight, given.ids(device), given.padding_idx, record), weight


def _gradient(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    grad_output = given.matrix(given.num_indices, device)
    rows = given.num_embeddings
    return (
        backend.embedding_dense_backward(
            grad_output, given.ids(device), rows, given.padding_idx, False
        ),
    )


def _counts(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    return (backend.embedding_counts(given.ids(device), given.num_embeddings),)


def _update(given: Input, device: torch.device) -> RowUpdate:
    """Integers stay integers under SGD; Adam has the most state."""
    return RowUpdate("sgd" if given.exact else "adam", 1.0, eps=1e-3, avg_weight=0.5, sq_weight=0.5)


def _state(given: Input, formula: str, weight: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation(given.dtype)
    return tuple(torch.ones_like(weight, dtype=dtype) for _ in STATE[formula])


def _row_update(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    weight, rows = given.matrix(given.num_embeddings, device).clone(), given.num_embeddings
    update, values = _update(given, device), given.matrix(given.num_indices, device)
    state = _state(given, update.formula, weight)
    changing = torch.arange(rows, device=device) % 3 != 1
    backend.row_update_(update, weight, state, given.ids(device), values, changing)
    return weight, *state


def _bag_sum(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    weight = given.matrix(given.num_embeddings, device)
    bags, record = given.bags(device), given.record(device)
    return (backend.embedding_bag(weight, None, bags, given.padding_idx, "sum", record),)


def _bag_max(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    weight = given.matrix(given.num_embeddings, device)
    bags, record = given.bags(device), given.record(device)
    found: tuple[Tensor, ...] = backend.embedding_bag_max(
        weight, bags, given.padding_idx, True, record
    )
    return found


def _bag_gradient(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    bags = given.bags(device)
    grad_output = given.matrix(bags.num_bags, device)
    rows, padding = given.num_embeddings, given.padding_idx
    return (
        backend.embedding_bag_dense_backward(grad_output, None, bags, rows, padding, "sum", False),
    )


def _dims(given: Input) -> tuple[int, ...]:
    """Two widths: tables of one width go to the kernels of a single table."""
    return given.embedding_dim, 2 * given.embedding_dim


def _table_bag(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = given.tables(device, _dims(given), True)
    buffer, record = given.numbers(layout.buffer_shape, device), given.record(device)
    return (backend.table_batched_embedding(buffer, None, batch, False, record),)


def _table_rows(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = given.tables(device, 2 * (given.embedding_dim,), False)
    buffer, record = given.numbers(layout.buffer_shape, device), given.record(device)
    return (backend.table_batched_embedding(buffer, None, batch, False, record),)


def _table_gradient(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = given.tables(device, _dims(given), True)
    grad_output = given.matrix(batch.bags_per_table, device, batch.width)
    shape = layout.buffer_shape
    return (backend.table_batched_embedding_dense_backward(grad_output, None, batch, shape),)


def _table_row_update(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = given.tables(device, _dims(given), True)
    shape, num_bags = batch.shape, batch.bags_per_table
    positions = torch.arange(given.num_indices, device=device)
    # As many ids a table, and in turns its bags.
    per_table = max(given.num_indices // layout.num_tables, 1)
    table = (positions // per_table).clamp(max=layout.num_tables - 1)
    output_bag = positions % num_bags * layout.num_tables + table
    in_table = (batch.indices >= 0) & (batch.indices < given.num_embeddings)
    entries = TableEntries(
        torch.where(in_table, batch.indices + table * given.num_embeddings, -1),
        output_bag,
        None,
        None,
        given.matrix(num_bags, device, batch.width),
        batch.fields,
        shape.num_rows,
        shape.widest,
        shape.dim_divisor,
    )
    buffer, update = given.numbers(layout.buffer_shape, device), _update(given, device)
    state = _state(given, update.formula, buffer)
    backend.table_row_update_(update, buffer, state, entries, None)
    return buffer, *state


def _take(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    weight = given.matrix(given.num_embeddings, device)
    # Negative ids count from the end.
    ids = given.ids(device) - given.num_embeddings // 2
    return (backend.take_rows(weight, ids, torch.bfloat16, given.record(device)),)


def _dequantize(backend: Any, given: Input, device: torch.device) -> tuple[Tensor, ...]:
    rows, dim = given.num_embeddings, given.embedding_dim
    integers = replace(given, exact=True)
    values = integers.numbers((rows, dim), device).to(torch.int8)
    # Powers of two.
    scale = 2.0 ** integers.numbers((rows,), device)
    table = QuantizedTable(values, scale, None, dim, dim, 8)
    return (backend.dequantize_rows(table, given.ids(device), torch.float32, given.record(device)),)


@contextmanager
def forced(method: str) -> Iterator[None]:
    """A method of the gather or of the gradient; left to the rules, another kernel might be launched."""
    gather = method if method in ("rows", "flat") else "auto"
    gradient = "auto" if gather == method else method
    with use_gather_method(gather), use_gradient_method(gradient):
        yield


@dataclass(frozen=True)
class Trial:
    """How a kernel is tried."""

    operation: Operation  # which launches it
    method: str = "auto"  # of the gather or the gradient
    # Atomics add in any order, so the bits of a sum of fractions vary from run to run.
    atomic: bool = False


# By the name of the kernel's settings, in both backends.
TRIALS = {
    "gather_rows": Trial(_lookup, "rows"),
    "gather_long_rows": Trial(_lookup, "rows"),
    "gather_flat": Trial(_lookup, "flat"),
    "scatter_add": Trial(_gradient, "atomic", atomic=True),
    "counts": Trial(_counts),
    "sort_keys": Trial(_gradient, "sorted"),
    "segment_sum": Trial(_gradient, "sorted"),
    "select_rows": Trial(_row_update),
    "row_update": Trial(_row_update),
    "bag_sum": Trial(_bag_sum),
    "bag_max": Trial(_bag_max),
    "bag_of": Trial(_bag_gradient, "sorted"),
    "table_bag": Trial(_table_bag),
    "table_gather": Trial(_table_rows),
    "table_keys": Trial(_table_gradient, "sorted"),
    "table_scatter_add": Trial(_table_gradient, "atomic", atomic=True),
    "table_segment_sum": Trial(_table_gradient, "sorted"),
    "table_row_update": Trial(_table_row_update),
    "take_rows": Trial(_take),
    "dequantize_rows": Trial(_dequantize),
}


def kernel_of(path: str) -> str:
    """The kernel whose settings have that path."""
    name = "gather_rows" if path == "gather_long_rows" else path.partition("[")[0]
    return f"{name}_kernel"


def trial_of(path: str) -> Trial:
    return TRIALS[path.partition("[")[0]]


def gate_inputs(backend: str, path: str, small: bool = False) -> tuple[Input, ...]:
    """Ragged, strided and bad ones, and fractions, whose sums show another order of additions.

    Args:
        small: few of few ids, for an interpreter.
    """
    narrow, wide = _gate_dims(backend, path)
    dtype, exact = _second_dtype(path), trial_of(path).atomic
    if small:
        odd = Input(70, 37, narrow, dtype, padding_idx=3, strided=True, bad=True)
        return odd, Input(66, 9, wide, exact=exact)
    return (
        Input(4141, 37, wide, padding_idx=3),
        Input(3535, 37, narrow, strided=True),
        Input(7070, 37, narrow, dtype, bad=True),
        Input(6666, 9, wide, exact=exact),
    )


def timed_inputs(backend: str, path: str) -> tuple[Input, ...]:
    """Small, middle, and large beside a card's cache."""
    width = _row_width(backend, path)
    if width:
        # 1, 8 and 64 MiB of a table of 256 MiB, or of one that is not as high.
        rows = min(2**28 // (4 * width), 100_000)
        return tuple(Input(2**power // (4 * width), rows, width) for power in (20, 23, 26))
    exact = not path.endswith("row_update")
    return (
        Input(4096, 100_000, 64, exact=exact),
        Input(32_768, 100_000, 128, exact=exact, dtype=_second_dtype(path)),
        Input(131_072, 50_000, 256, exact=exact),
    )


def _second_dtype(path: str) -> torch.dtype:
    """Atomics add no 16-bit numbers, and the width of rows in words depends on the dtype."""
    is_fixed = trial_of(path).atomic or path.startswith("gather_")
    return torch.float32 if is_fixed else torch.bfloat16


def _gate_dims(backend: str, path: str) -> tuple[int, int]:
    width = _row_width(backend, path)
    if not width:
        return 5, 20
    # Wider rows take the widest tile more than once.
    return width, 2 * width if path.endswith(("[512]", "[128]")) else width


def _row_width(backend: str, path: str) -> int:
    """Columns of float32 of the rows that settings of gather_rows are for; 0: others."""
    if path == "gather_long_rows":
        return 4100
    if not path.startswith("gather_rows["):
        return 0
    # Words have 8 bytes, or 16 in CUDA C++.
    return int(path.partition("[")[2][:-1]) * (2 if backend == "triton" else 4)
