"""Every operation of a backend on a few small integers, against the NumPy reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .backends._plan.gather import use_gather_method
from .backends._plan.gradient_method import use_gradient_method
from .bags import Bags
from .fused_rows import FusedRows, quantize_rows
from .row_update import RowUpdate
from .shard import Shard
from .tables.batch import TableBatch
from .tables.entries import TableEntries
from .tables.layout import TableLayout, make_layout
from .take import QuantizedTable, fused_table


@dataclass(frozen=True)
class Check:
    """One backend on one device against the NumPy reference."""

    device: str
    backend: str
    status: str  # "right", "wrong", "failed" or "not usable"
    detail: str  # what is wrong, or why it is not usable
    milliseconds: float


def check_device(device: torch.device) -> list[Check]:
    """Every backend on this device; a second for all of them, first compilation aside."""
    return [check_backend(name, device) for name in backends.BACKENDS]


def check_backend(name: str, device: torch.device) -> Check:
    """All of SAMPLES on one backend, with the kernels of its own choice."""
    backend = backends.load(name)
    begin = time.perf_counter()
    reason = backend.unusable_reason(device)
    if reason is not None:
        status, detail = "not usable", reason
    else:
        with use_gather_method("auto"), use_gradient_method("auto"):
            status, detail = _compare(backend, device)
    took = round(1e3 * (time.perf_counter() - begin), 1)
    return Check(str(device), name, status, detail, took)


def _compare(backend: Backend, device: torch.device) -> tuple[str, str]:
    """Status and detail of a backend that is usable."""
    reference = backends.load("reference")
    wrong = []
    for operation, sample in SAMPLES.items():
        # A self-check has to survive whatever a broken installation raises.
        try:
            results = [result.cpu() for result in sample(backend, device)]
        except Exception as error:
            return "failed", f"{operation}: {type(error).__name__}: {error}"
        if not all(map(torch.equal, results, sample(reference, torch.device("cpu")))):
            wrong.append(operation)
    if wrong:
        return "wrong", f"differs from the reference in {', '.join(wrong)}"
    return "right", ""


# Small integers, whose sums are exact in any order; counts and norms are powers of two, so that quotients are too.
ROWS, COLUMNS, NUM_IDS = 37, 20, 96
PADDING = 3


def _numbers(shape: tuple[int, ...], modulus: int, device: torch.device) -> Tensor:
    """Floats around 0, the same on each device."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device) % modulus - float(modulus // 2)).view(shape)


def _table(device: torch.device) -> Tensor:
    return _numbers((ROWS, COLUMNS), 11, device)


def _ids(device: torch.device) -> Tensor:
    return (torch.arange(NUM_IDS, device=device) ** 2 % ROWS).view(4, -1)


def _lookup(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    return (backend.embedding(_table(device), _ids(device), PADDING, None),)


def _gradient(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    grad_output = _numbers((*_ids(device).shape, COLUMNS), 7, device)
    return (backend.embedding_dense_backward(grad_output, _ids(device), ROWS, PADDING, False),)


def _deterministic_gradient(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    with _deterministic_algorithms():
        return _gradient(backend, device)


def _renorm(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    table = torch.full((ROWS, 16), 2.0, device=device)
    backend.embedding_renorm_(table, _ids(device), 4.0, 2.0)
    return (table,)


def _counts(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    return (backend.embedding_counts(_ids(device), ROWS),)


def _bags(device: torch.device) -> Bags:
    """Bags of 0, 8, 64 and 24 ids."""
    offsets = torch.tensor([0, 0, 8, 72], device=device)
    return Bags(_ids(device).view(-1), offsets, len(offsets))


def _bag(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    table, bags = _table(device), _bags(device)
    weights = _numbers((NUM_IDS,), 5, device)
    even = Bags(bags.indices, None, NUM_IDS // 4)
    return (
        backend.embedding_bag(table, weights, bags, PADDING, "sum", None),
        backend.embedding_bag(table, None, even, -1, "mean", None),
        *backend.embedding_bag_max(table, bags, PADDING, True, None),
    )


def _bag_gradient(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    bags, weights = _bags(device), _numbers((NUM_IDS,), 5, device)
    grad_output = _numbers((bags.num_bags, COLUMNS), 7, device)
    return (
        backend.embedding_bag_dense_backward(
            grad_output, weights, bags, ROWS, PADDING, "sum", False
        ),
        backend.embedding_bag_sample_weights_backward(grad_output, _table(device), bags, PADDING),
    )


def _shard(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    """Rows 10 to 29 of the table."""
    rows, bags, shard = _table(device)[10:30], _bags(device), Shard(10, ROWS)
    grad_output = _numbers((NUM_IDS, COLUMNS), 7, device)
    return (
        backend.embedding(rows, bags.indices, PADDING, None, shard),
        backend.embedding_dense_backward(
            grad_output, bags.indices, len(rows), PADDING, False, None, shard
        ),
        backend.embedding_bag(rows, None, bags, PADDING, "sum", None, shard),
        *backend.embedding_bag_max(rows, bags, PADDING, True, None, shard),
    )


def _batch(device: torch.device, mode: str = "mean") -> tuple[TableLayout, TableBatch]:
    """A table of sums and a wider one of this mode, each with bags of four ids."""
    layout = make_layout([(ROWS, 8), (ROWS, COLUMNS)], ["sum", mode], [PADDING, None])
    indices = _ids(device).view(-1)
    offsets = torch.arange(0, NUM_IDS + 1, 4, device=device)
    fields, table_of_column = layout.fields(device), layout.table_of_column(device)
    return layout, TableBatch(indices, offsets, fields, table_of_column, layout.shape(True))


def _table_batched(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = _batch(device)
    _, maxima = _batch(device, "max")
    buffer = _numbers(layout.buffer_shape, 11, device)
    return (
        backend.table_batched_embedding(buffer, None, batch, False, None),
        backend.table_batched_embedding_max(buffer, maxima, False, None)[0],
    )


def _table_batched_gradient(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    layout, batch = _batch(device)
    _, sums = _batch(device, "sum")
    buffer = _numbers(layout.buffer_shape, 11, device)
    # Multiples of four, the number of ids that a mean divides by.
    grad_output = 4 * _numbers((batch.bags_per_table, batch.width), 7, device)
    return (
        backend.table_batched_embedding_dense_backward(
            grad_output, None, batch, layout.buffer_shape
        ),
        backend.table_batched_embedding_sample_weights_backward(grad_output, buffer, sums),
    )


def _row_update(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    table, values = _table(device), _numbers((NUM_IDS, COLUMNS), 7, device)
    update = RowUpdate("sgd", step_size=0.5)
    backend.row_update_(update, table, (), _ids(device).view(-1), values, None)
    return (table,)


def _table_row_update(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    """An entry an id of tables of two widths, its values in the gradient of their sums."""
    layout, batch = _batch(device, "sum")
    places, shape = batch.places(), batch.shape
    bag = places.bag - places.table * batch.bags_per_table
    entries = TableEntries(
        torch.where(places.counted, places.row, -1),
        bag * batch.num_tables + places.table,
        None,
        None,
        _numbers((batch.bags_per_table, batch.width), 7, device),
        batch.fields,
        shape.num_rows,
        shape.widest,
        shape.dim_divisor,
    )
    buffer = _numbers(layout.buffer_shape, 11, device)
    backend.table_row_update_(RowUpdate("sgd", step_size=0.5), buffer, (), entries, None)
    return (buffer,)


def _keras_lookup(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    return (backend.take_rows(_table(device), _ids(device) - ROWS, torch.bfloat16, None),)


def _keras_quantized_lookup(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    """8 bits with a scale a row, and 4 bits with a scale and a zero for each group of 4 columns."""
    scale = 2.0 ** _numbers((ROWS, COLUMNS // 4), 5, device)
    values, zero = (_numbers(scale.shape[:1] + (n,), 13, device) for n in (COLUMNS, COLUMNS // 4))
    values, zero = values.to(torch.int8), zero.to(torch.int8)
    wide = QuantizedTable(values, scale[:, 0].contiguous(), None, COLUMNS, COLUMNS, 8)
    packed = values[:, : COLUMNS // 2].contiguous()
    narrow = QuantizedTable(packed, scale, zero, COLUMNS, 4, 4)
    ids = _ids(device) - ROWS
    return tuple(
        backend.dequantize_rows(table, ids, torch.float32, None) for table in (wide, narrow)
    )


def _quantized_lookup(backend: Backend, device: torch.device) -> tuple[Tensor, ...]:
    """8 bits with a scale a row, and 4 bits with one for each group of 4 columns."""
    rows = _numbers((ROWS, COLUMNS), 13, device)
    layouts = (FusedRows(COLUMNS, COLUMNS, 8), FusedRows(COLUMNS, 4, 4))
    tables = [fused_table(quantize_rows(rows, layout), layout) for layout in layouts]
    return tuple(
        backend.dequantize_rows(table, _ids(device), torch.float32, None) for table in tables
    )


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    # torch.use_deterministic_algorithms does the same, and imports the compiler, which takes seconds.
    former = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(former)


SAMPLES: dict[str, Callable[[Backend, torch.device], tuple[Tensor, ...]]] = {
    "lookup": _lookup,
    "gradient": _gradient,
    "deterministic gradient": _deterministic_gradient,
    "max_norm": _renorm,
    "scale_grad_by_freq": _counts,
    "bags": _bag,
    "gradient of bags": _bag_gradient,
    "shards": _shard,
    "batched tables": _table_batched,
    "gradient of batched tables": _table_batched_gradient,
    "optimizer updates": _row_update,
    "batched optimizer updates": _table_row_update,
    "Keras lookup": _keras_lookup,
    "Keras quantized lookup": _keras_quantized_lookup,
    "quantized lookup": _quantized_lookup,
}
