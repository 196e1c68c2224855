"""The ids of many tables in one tensor, with offsets, as the batched layers take them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TableInput(NamedTuple):
    """The arguments of `TableBatchedEmbeddingBag`; `TableBatchedEmbedding` takes the first two."""

    input: Tensor  # [N]
    offsets: Tensor  # int64 [T * B + 1]: bag t * B + b is bag b of table t
    per_sample_weights: Tensor | None = None  # [N]


def batch_bags(
    tables: Sequence[tuple[Tensor, ...]], include_last_offset: bool = False
) -> TableInput:
    """Put the ids and offsets of T tables together; nothing waits for the GPU.

    Args:
        tables: for each table what `torch.nn.EmbeddingBag` takes: (ids `[n]`, offsets `[B]`) or (ids, offsets,
            per_sample_weights `[n]`); all tables with the same B.
        include_last_offset: offsets are `[B + 1]`, the last where the last bag ends; ids behind it are put
            behind all bags.

    Raises:
        ValueError: shapes that do not fit, or weights for some tables and not for others.
    """
    _check_tables(tables)
    for table, tensors in enumerate(tables):
        if len(tensors) != len(tables[0]):
            raise ValueError(
                f"batch_bags: table {table}: expected {len(tables[0])} tensors, got {len(tensors)}"
            )
    ids, offsets, *rest = zip(*tables, strict=True)
    for table, (values, begins) in enumerate(zip(ids, offsets, strict=True)):
        if values.dim() != 1 or begins.dim() != 1 or len(begins) != len(offsets[0]):
            raise ValueError(
                f"batch_bags: table {table}: expected ids [n] and offsets {list(offsets[0].shape)}, "
                f"got {list(values.shape)} and {list(begins.shape)}"
            )
    flat = torch.cat(ids)
    weights = torch.cat(rest[0]) if rest else None
    device = flat.device
    firsts = torch.tensor([0] + [len(values) for values in ids]).cumsum(0).tolist()
    if not include_last_offset:
        parts = [
            begins.to(torch.int64) + first for begins, first in zip(offsets, firsts, strict=False)
        ]
        end = torch.full((1,), firsts[-1], dtype=torch.int64, device=device)
        return TableInput(flat, torch.cat([*parts, end]), weights)
    lengths = torch.cat([begins.to(torch.int64).diff() for begins in offsets])
    places = [
        torch.arange(len(values), device=device) < begins[-1]
        for values, begins in zip(ids, offsets, strict=True)
    ]
    return _kept_first(flat, torch.cat(places), lengths, weights)


def batch_padded(
    tables: Tensor | Sequence[Tensor],
    lengths: Tensor | Sequence[Tensor] | None = None,
    padding_value: int | None = None,
    per_sample_weights: Tensor | Sequence[Tensor] | None = None,
) -> TableInput:
    """Put padded ids of T tables together; nothing waits for the GPU.

    The result has the size of what is given: ids that are left out are put behind all bags.

    Args:
        tables: ids `[T, B, L]`, or T tensors `[B, L]`, each with an L of its own.
        lengths: how many ids of each row count, from its first on: `[T, B]`, or T tensors `[B]`.
        padding_value: ids equal to it do not count, wherever they stand. Not beside lengths; without either,
            all ids count.
        per_sample_weights: of the ids' shapes.

    Raises:
        ValueError: shapes that do not fit, or both lengths and padding_value.
    """
    if lengths is not None and padding_value is not None:
        raise ValueError("batch_padded: give lengths or padding_value, not both")
    _check_tables(tables)
    for table, ids in enumerate(tables):
        if ids.dim() != 2 or len(ids) != len(tables[0]):
            raise ValueError(
                f"batch_padded: table {table}: expected ids [{len(tables[0])}, L], got {list(ids.shape)}"
            )
    for name, values, dims in (
        ("lengths", lengths, 1),
        ("per_sample_weights", per_sample_weights, 2),
    ):
        if values is not None:
            shapes = [list(value.shape) for value in values]
            expected = [list(ids.shape[:dims]) for ids in tables]
            if shapes != expected:
                raise ValueError(
                    f"batch_padded: expected {name} of shapes {expected}, got {shapes}"
                )
    kept = []
    for table, ids in enumerate(tables):
        if lengths is not None:
            kept.append(torch.arange(ids.shape[1], device=ids.device) < lengths[table][:, None])
        elif padding_value is not None:
            kept.append(ids != padding_value)
        else:
            kept.append(torch.ones_like(ids, dtype=torch.bool))
    weights = None
    if per_sample_weights is not None:
        weights = torch.cat([values.reshape(-1) for values in per_sample_weights])
    return _kept_first(
        torch.cat([ids.reshape(-1) for ids in tables]),
        torch.cat([mask.reshape(-1) for mask in kept]),
        torch.cat([mask.sum(1) for mask in kept]),
        weights,
    )


def _check_tables(tables: Tensor | Sequence[object]) -> None:
    if len(tables) == 0:
        raise ValueError("at least one table is needed")


def _kept_first(ids: Tensor, kept: Tensor, lengths: Tensor, weights: Tensor | None) -> TableInput:
    """The ids that are kept in their order, then the others, so that no shape depends on the data."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    place = torch.where(kept, kept.cumsum(0), offsets[-1] + (~kept).cumsum(0)) - 1
    moved = torch.empty_like(ids).scatter_(0, place, ids)
    if weights is not None:
        weights = torch.zeros_like(weights).scatter(0, place, weights)
    return TableInput(moved, offsets, weights)
