"""Many tables in one buffer.

`tables` int [T, 8] holds the columns that `gpu_embed.tables.layout.TableColumn` names.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..tables.layout import MODES, TableColumn
from .bag import (
    embedding_bag,
    embedding_bag_dense_backward,
    embedding_bag_sample_weights_backward,
    largest_of_bags,
)
from .lookup import Array, embedding, embedding_dense_backward


def table_batched_embedding(
    weight: Array,
    indices: Array,
    offsets: Array,
    tables: Array,
    pooled: bool,
    per_sample_weights: Array | None = None,
    zero_padding: bool = False,
    max_positions: Array | None = None,
) -> Array:
    """Bags of T tables, table-major (offsets [T * B + 1]) -> [B, sum D]; not pooled: rows of each id -> [N, D].

    Where they are not pooled, rows of padding_idx are read as stored unless zero_padding. Of a table of mode
    "max" the values at the positions max_positions [B, sum D].
    """
    num_bags = (len(offsets) - 1) // len(tables)
    parts = list(table_parts(weight, indices, offsets, tables))
    if pooled:
        output = np.zeros((num_bags, tables[:, TableColumn.DIM].sum()), weight.dtype)
        for part in parts:
            weights = None if per_sample_weights is None else per_sample_weights[part.positions]
            if part.mode == "max":
                assert max_positions is not None
                output[:, part.columns] = values_at(
                    part.weight, indices, max_positions[:, part.columns]
                )
                continue
            output[:, part.columns] = embedding_bag(
                part.weight, part.indices, part.offsets, part.padding_idx, part.mode, weights
            )
        return output
    output = np.zeros((len(indices), tables[0, TableColumn.DIM]), weight.dtype)
    for part in parts:
        zero_idx = part.padding_idx if zero_padding else -1
        output[part.positions] = embedding(part.weight, part.indices, zero_idx)
    return output


def table_batched_embedding_max(
    weight: Array, indices: Array, offsets: Array, tables: Array
) -> tuple[Array, Array]:
    """Bags as of table_batched_embedding, and for tables of mode "max" which position each maximum is; -1: none."""
    num_bags = (len(offsets) - 1) // len(tables)
    max_positions = np.full((num_bags, tables[:, TableColumn.DIM].sum()), -1)
    for part in table_parts(weight, indices, offsets, tables):
        if part.mode == "max":
            _, position = largest_of_bags(part.weight, part.indices, part.offsets, part.padding_idx)
            max_positions[:, part.columns] = np.where(
                position < 0, -1, position + part.positions.start
            )
    output = table_batched_embedding(
        weight, indices, offsets, tables, True, max_positions=max_positions
    )
    return output, max_positions


def values_at(weight: Array, indices: Array, positions: Array) -> Array:
    """From each column of weight [V, D] the elements in the rows of the ids at positions [B, D]; -1: zero."""
    ids = np.append(indices, 0).astype(np.int64)[positions]
    columns = np.arange(weight.shape[1])
    output = np.zeros(positions.shape, weight.dtype)
    there = positions >= 0
    output[there] = weight[ids, columns][there] if len(weight) else 0
    return output


def table_batched_embedding_dense_backward(
    grad_output: Array,
    indices: Array,
    offsets: Array,
    tables: Array,
    pooled: bool,
    weight_shape: tuple[int, ...],
    per_sample_weights: Array | None = None,
    max_positions: Array | None = None,
) -> Array:
    """Gradient of table_batched_embedding's buffer -> weight_shape."""
    grad_weight = np.zeros(weight_shape, grad_output.dtype)
    # Several features may look up in one table: their gradients add up.
    for part in table_parts(grad_weight, indices, offsets, tables):
        num_embeddings = len(part.weight)
        if part.mode == "max":
            assert max_positions is not None
            bag, column = np.nonzero(max_positions[:, part.columns] >= 0)
            rows = indices[max_positions[:, part.columns][bag, column]]
            # Ids of a table without rows have maxima where it has them in the lookup alone.
            named = (rows >= 0) & (rows < num_embeddings)
            bag, column, rows = bag[named], column[named], rows[named]
            total = np.zeros(part.weight.shape)
            np.add.at(total, (rows, column), grad_output[:, part.columns][bag, column])
            part.weight[:] += total
        elif pooled:
            weights = None if per_sample_weights is None else per_sample_weights[part.positions]
            part.weight[:] += embedding_bag_dense_backward(
                grad_output[:, part.columns],
                part.indices,
                part.offsets,
                num_embeddings,
                part.padding_idx,
                part.mode,
                weights,
            )
        else:
            part.weight[:] += embedding_dense_backward(
                grad_output[part.positions], part.indices, num_embeddings, part.padding_idx
            )
    return grad_weight


def table_batched_embedding_sample_weights_backward(
    grad_output: Array, weight: Array, indices: Array, offsets: Array, tables: Array
) -> Array:
    """Gradient of table_batched_embedding's per_sample_weights -> [N]."""
    grad = np.zeros(len(indices), grad_output.dtype)
    for part in table_parts(weight, indices, offsets, tables):
        grad[part.positions] = embedding_bag_sample_weights_backward(
            grad_output[:, part.columns],
            part.weight,
            part.indices,
            part.offsets,
            part.padding_idx,
        )
    return grad


class TablePart(NamedTuple):
    """One table's share of a batch."""

    weight: Array  # [V, D], in the buffer's memory
    indices: Array  # [n]
    offsets: Array  # [B + 1], from 0 on
    positions: slice  # of those ids among all
    columns: slice  # of the output
    padding_idx: int
    mode: str


def table_parts(
    weight: Array, indices: Array, offsets: Array, tables: Array
) -> Iterator[TablePart]:
    num_bags = (len(offsets) - 1) // len(tables)
    for number, table in enumerate(tables):
        rows, dim = table[TableColumn.NUM_ROWS], table[TableColumn.DIM]
        first_element, first_column = (
            table[TableColumn.FIRST_ELEMENT],
            table[TableColumn.FIRST_COLUMN],
        )
        ends = offsets[number * num_bags : (number + 1) * num_bags + 1]
        positions = slice(ends[0], ends[-1])
        yield TablePart(
            weight.reshape(-1)[first_element : first_element + rows * dim].reshape(rows, dim),
            indices[positions],
            ends - ends[0],
            positions,
            slice(first_column, first_column + dim),
            int(table[TableColumn.PADDING_IDX]),
            MODES[table[TableColumn.MODE]],
        )
