"""Lookups in one table, and in many: one after another, or by this package's batched layers in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

import gpu_embed

from .layer import (
    APART,
    ONE_UNDER_ANOTHER,
    SIDE_BY_SIDE,
    Layer,
    Order,
    padded,
    side_by_side,
)
from .shapes import Cell

BatchedTables = gpu_embed.TableBatchedEmbedding | gpu_embed.TableBatchedEmbeddingBag


def _lookup(functional: ModuleType, cell: Cell, sparse: bool) -> Callable[..., Tensor]:
    """Of ids and a table, by torch.nn.functional or by ours, whose signatures are the same."""
    if cell.pooled:
        sums = partial(functional.embedding_bag, mode="sum", sparse=sparse)
        return (lambda ids, table: sums(*by_offsets(cell, ids, table))) if cell.by_offsets else sums
    return partial(functional.embedding, padding_idx=cell.padding_idx, sparse=sparse)


def single(functional: ModuleType, weight: Tensor, cell: Cell, sparse: bool) -> Layer:
    """One table, itself the leaf."""
    lookup = _lookup(functional, cell, sparse)
    return Layer(lambda ids: lookup(ids, weight), weight)


def in_turns(functional: ModuleType, weight: Tensor, cell: Cell, sparse: bool) -> Layer:
    """A loop over the tables, each a leaf of its own: what a `ModuleList` of torch's layers does.

    The outputs stay apart, so that no time goes into putting them together.
    """
    parts = tuple(torch.nn.Parameter(rows) for rows in weight.detach().split(cell.vocab))
    # A model has the ids of each table in a tensor of their own.
    ids_of_tables = cache(torch.unbind)
    look_up = _lookup(functional, cell, sparse)

    def lookup(ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(look_up(*pair) for pair in zip(ids_of_tables(ids), parts, strict=True))

    return Layer(lookup, weight, parts=parts, order=APART)


def together(weight: Tensor, cell: Cell) -> Layer:
    """A loop over `torch.nn.EmbeddingBag`s, each with offsets of its own, whose outputs are put side by side."""
    modules = [
        torch.nn.EmbeddingBag(cell.vocab, rows.shape[1], mode="sum", _weight=rows)
        for rows in _tables_of(weight, cell)
    ]

    @cache
    def inputs(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        ends = cell.num_ids // cell.tables, cell.hotness, ids.dtype, ids.device
        return [(own.reshape(-1), _offsets(*ends).clone()) for own in ids]

    def lookup(ids: Tensor) -> Tensor:
        bags = zip(modules, inputs(ids), strict=True)
        return torch.cat([module(*own) for module, own in bags], 1)

    def gathered_gradients(gradients: Sequence[Tensor]) -> Tensor:
        return torch.cat([padded(gradient, cell.dim) for gradient in gradients])

    parts = tuple(module.weight for module in modules)
    order = side_by_side(cell.widths)
    return Layer(lookup, weight, parts=parts, order=order, gathered_gradients=gathered_gradients)


def batched(weight: Tensor, cell: Cell, sparse: bool) -> Layer:
    """gpu_embed.TableBatchedEmbedding, or for bags TableBatchedEmbeddingBag, on this memory."""
    kind: type[BatchedTables] = (
        gpu_embed.TableBatchedEmbeddingBag if cell.pooled else gpu_embed.TableBatchedEmbedding
    )
    # On the meta device no table is drawn, only to be replaced.
    tables = kind([(cell.vocab, width) for width in cell.widths], sparse=sparse, device="meta")
    layout, lookup = tables.layout, offsets_lookup(tables, cell)
    if cell.is_uniform:
        tables._set_buffer(weight.detach())
        return Layer(lookup, tables.weight, order=order_of(cell))
    tables._set_buffer(weight.new_zeros(layout.buffer_shape))
    for table, rows in enumerate(_tables_of(weight, cell)):
        layout.view(tables.weight.detach(), table).copy_(rows)

    def gathered_gradients(gradients: Sequence[Tensor]) -> Tensor:
        (gradient,) = gradients
        views = [layout.view(gradient, table) for table in range(cell.tables)]
        return torch.cat([padded(view, cell.dim) for view in views])

    order = side_by_side(cell.widths)
    return Layer(lookup, weight, None, (tables.weight,), order, gathered_gradients)


def _tables_of(weight: Tensor, cell: Cell) -> list[Tensor]:
    """Each table's rows of the tables one under another: a view where it has all columns."""
    parts = zip(weight.detach().split(cell.vocab), cell.widths, strict=True)
    return [rows[:, :width].contiguous() for rows, width in parts]


def order_of(cell: Cell) -> Order:
    """How batched layers, ours and FBGEMM's, hand their rows out."""
    return SIDE_BY_SIDE if cell.pooled and cell.tables > 1 else ONE_UNDER_ANOTHER


def by_offsets(cell: Cell, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of embedding_bag for ids [B, L]: flat ids, the table, and where each bag begins."""
    return ids.view(-1), table, _offsets(ids.numel(), cell.hotness, ids.dtype, ids.device)


def offsets_lookup(tables: Callable[..., Tensor], cell: Cell) -> Callable[[Tensor], Tensor]:
    """Of flat ids and where each bag begins; without sums a bag is one id."""
    return lambda ids: tables(
        ids.view(-1), _offsets(cell.num_ids + 1, cell.hotness, ids.dtype, ids.device)
    )


@cache
def _offsets(end: int, step: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(0, end, step, dtype=dtype, device=device)
